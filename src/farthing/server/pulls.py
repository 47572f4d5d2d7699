"""Larger models for the page of a server that only this machine can reach: which ones fit, and one download.

    GET /dashboard/models     larger models that fit, and the download
    GET /dashboard/pull       the download: what is done, how much of it and of how much, and its error
    POST /dashboard/pull      {"model": NAME}: begin one

A download fills a disk, so that strangers must not begin one; see `require_own_page`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Body as FromBody
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from farthing import hub
from farthing.catalogue import catalogue
from farthing.checkpoint.reader import Checkpoint
from farthing.memory import machine_memory
from farthing.planner.offers import offers_here, worth
from farthing.server.access import require_own_page
from farthing.server.errors import ApiError
from farthing.server.schema import Strict, short
from farthing.server.service import Service

log = logging.getLogger("farthing.server")


class PullRequest(Strict):
    """Body of /dashboard/pull. model: a name of the catalogue."""

    model: str


@dataclass(frozen=True, slots=True)
class Pull:
    """A download. what: is done now; empty once it has ended, with an error or without."""

    model: str
    what: str = "asking the hub"
    done: int = 0  # bytes
    total: int = 0
    error: str = ""

    def document(self) -> dict[str, Any]:
        """As the page reads it."""
        return {name: getattr(self, name) for name in self.__slots__}


class Pulls:
    """What the catalogue has for this machine, and the last download. Used in the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.last: Pull | None = None

    def check(self, request: Request) -> None:
        """Raises ApiError (403); see `require_own_page`."""
        config = self._service.config
        require_own_page(config, request, "models are not downloaded here", "`farthing pull`")

    def models(self) -> list[dict[str, Any]]:
        """A few that fit and are larger than the one that is served, the most worth having first. Measures
        the machine, for about a second."""
        engine = self._service.engine
        served = _stored(engine.config.model) if engine is not None else 0
        here = {each.model for each in hub.cached() if each.whole}
        larger = [each for each in offers_here() if each.file.size > served and not each.entry.gated]
        return [
            {
                "name": each.entry.name,
                "download": each.file.size,
                "memory": each.memory,
                "tokens_per_second": each.tokens_per_second,
                "first_answer": each.first_answer,
                "here": each.entry.repository in here,
            }
            for each in worth(larger)
        ]

    def begin(self, model: str) -> Pull:
        """Raises ApiError: 404 for a model that is not in the catalogue or does not fit, 409 while another is
        downloaded."""
        memory, entry = machine_memory(), catalogue().get(model)
        if entry is None or entry.gated or not entry.fits(entry.best(memory), memory):
            why = f"model: got {short(model)}; expected one of `farthing models` that fits and is not gated"
            raise ApiError(404, why, param="model", code="model_not_found")
        if self.last is not None and self.last.what:
            raise ApiError(409, f"{self.last.model} is being downloaded; one at a time", code="pull_running")
        self.last = Pull(model)
        log.info("%s: downloading, as the page asked", model)
        threading.Thread(target=self._fetch, args=(self.last,), name="pull", daemon=True).start()
        return self.last

    def _fetch(self, pull: Pull) -> None:
        def progress(what: str, done: int, total: int) -> None:
            self.last = replace(pull, what=what, done=done, total=total)

        try:
            hub.find_model(pull.model).fetch(progress)
            self.last = replace(pull, what="")
            log.info("%s: downloaded", pull.model)
        # Whatever the hub's library raises: a dead thread would block the next download.
        except Exception as error:
            self.last = replace(pull, what="", error=str(error) or type(error).__name__)
            log.warning("%s: not downloaded: %s", pull.model, error)


def _stored(model: str) -> int:
    """Bytes of a model's weights."""
    return Checkpoint.open(hub.resolve_config(model)).stored_bytes()


def add_routes(api: FastAPI, service: Service) -> None:
    """Add what the page asks for larger models."""
    pulls = Pulls(service)

    def state() -> dict[str, Any] | None:
        return None if pulls.last is None else pulls.last.document()

    @api.get("/dashboard/models", include_in_schema=False)
    async def models(request: Request) -> Response:
        pulls.check(request)
        return JSONResponse({"models": await asyncio.to_thread(pulls.models), "pull": state()})

    @api.get("/dashboard/pull", include_in_schema=False)
    async def progress(request: Request) -> Response:
        pulls.check(request)
        return JSONResponse(state())

    @api.post("/dashboard/pull", include_in_schema=False)
    async def pull(request: Request, body: PullRequest = FromBody()) -> Response:
        pulls.check(request)
        await service.unknown_fields.check(body, request.scope)
        return JSONResponse(pulls.begin(body.model).document(), 202)
