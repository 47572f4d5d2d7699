"""The dashboard in a FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response

from farthing.server.dashboard.site import DATA_PATH, HEADERS, PREFIX, Asset, Dashboard

View = Callable[[Request, dict[str, Any]], dict[str, Any]]  # the part of a document that a request may see


def router(dashboard: Dashboard, view: View = lambda request, document: document) -> APIRouter:
    """Routes for the page (`/`), its assets and its data."""
    routes = APIRouter(include_in_schema=False)

    @routes.head("/")
    @routes.get("/")
    @routes.get(PREFIX.rstrip("/"))
    def page() -> Response:
        return _response(dashboard.asset("/"))

    @routes.get(DATA_PATH)
    def data(request: Request, since: float = 0.0) -> dict[str, Any]:
        return view(request, dashboard.document(since))

    @routes.get(PREFIX + "{path:path}")
    def asset(path: str) -> Response:
        return _response(dashboard.asset(PREFIX + path))

    return routes


def mount(
    app: FastAPI,
    data: Callable[[], Mapping[str, Any]],
    view: View = lambda request, document: document,
    interval: float = 1.0,
) -> Dashboard:
    """Serve the dashboard from `app` and sample `data` while the application runs."""
    dashboard = Dashboard(data, interval)
    app.include_router(router(dashboard, view))
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: Any) -> AsyncIterator[Any]:
        async with inner(running) as state:
            with dashboard:
                yield state

    app.router.lifespan_context = lifespan
    return dashboard


def _response(asset: Asset | None) -> Response:
    if asset is None:
        raise HTTPException(404, "no such page")
    return Response(asset.body, media_type=asset.content_type, headers=HEADERS)
