"""The HTTP application: middleware, errors, and what is asked about the server instead of the model."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import farthing
from farthing.server import pulls
from farthing.server.access import Access
from farthing.server.api.routes import ERRORS, add_routes
from farthing.server.bodies import Bodies
from farthing.server.cache_digest import CacheDigest
from farthing.server.config import ServerConfig
from farthing.server.errors import ApiError, ClientGone, is_anthropic
from farthing.server.metrics import PAGES, Metrics
from farthing.server.schema import describe_unparsed, describe_validation
from farthing.server.service import Service

# Every response carries an id of its request, under the names that the publishers' SDKs read.

_FIELDS = (b"x-request-id", b"request-id")  # OpenAI's, Anthropic's
_USABLE = re.compile(rb"[\x21-\x7e]{1,128}")


class Answers:
    """ASGI middleware that adds the client's own X-Request-Id, or a new id, to the head of every answer, and
    counts answers by path and status. Unknown paths share one label."""

    def __init__(self, app: ASGIApp, count: Counter, paths: frozenset[str]) -> None:
        self.app = app
        self._count, self._paths = count, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request, and name and count its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own = dict(scope["headers"]).get(_FIELDS[0], b"")
        identity = own if _USABLE.fullmatch(own) else f"req_{uuid.uuid4().hex}".encode()
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def name(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((field, identity) for field in _FIELDS)]
                self._count.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, name)


# Endpoints of OpenAI's and Anthropic's APIs that do not exist here, with the reasons.

_STATELESS = "nothing is stored between requests except recent responses"
_PULL = "models are managed by `farthing pull`, `list` and `rm`"
_TEXT = "the model reads and writes text only"
# Prefixes of paths, as far as a reason applies to all paths below.
_REASONS = {
    "/v1/responses/compact": "compaction of responses: send shorter input, or truncation = 'auto'",
    "/v1/conversations": f"conversations: {_STATELESS}; use previous_response_id, or send all items in input",
    "/v1/messages/batches": "message batches: send each request to /v1/messages",
    "/v1/batches": "batches: send each request itself",
    "/v1/complete": "Anthropic's text completions: use /v1/messages",
    "/v1/moderations": "moderations: the model is a causal language model",
    "/v1/score": "scores: the model is a causal language model",
    "/v1/audio": f"audio: {_TEXT}",
    "/v1/images": f"images: {_TEXT}",
    "/v1/videos": f"videos: {_TEXT}",
    "/v1/realtime": f"realtime sessions: {_TEXT}; use /v1/responses with stream = true",
    "/v1/files": f"files: {_STATELESS}; send their text",
    "/v1/uploads": f"uploads: {_STATELESS}; send their text",
    "/v1/vector_stores": f"vector stores: {_STATELESS}",
    "/v1/assistants": "assistants: use /v1/responses",
    "/v1/threads": "threads: use /v1/responses",
    "/v1/containers": "containers: the server runs no code",
    "/v1/skills": "skills: the server runs no code",
    "/v1/fine_tuning": "fine-tuning: see `farthing train`",
    "/v1/evals": "evals: see `farthing eval`",
    "/api/create": f"creating models: {_PULL}",
    "/api/copy": f"copying models: {_PULL}",
    "/api/delete": f"removing models: {_PULL}",
    "/api/push": f"publishing models: {_PULL}",
    "/api/blobs": f"files: {_PULL}",
    "/v1/organization": "administration of organizations",
    "/v1/organizations": "administration of organizations",
}


_LONGEST = 1 + max(path.count("/") for path in _REASONS)  # parts, the empty one before the path among them


def reason(path: str) -> str | None:
    """Why an endpoint does not exist; None if it belongs to no known API."""
    parts = path.rstrip("/").split("/", _LONGEST)  # a path of 30,000 parts has as many beginnings
    for length in range(min(len(parts), _LONGEST), 2, -1):
        if (why := _REASONS.get("/".join(parts[:length]))) is not None:
            return f"{path} is not served: {why}"
    return None


def misplaced(path: str, known: Collection[str]) -> str | None:
    """A hint for a path that a client made from a wrong base URL; None if it ends in no known endpoint."""
    parts = [] if path in known else [part for part in path.split("/") if part]
    parts = parts[-max((each.count("/") for each in known), default=1) :]  # the longest that can end in one
    right = (f"/v1/{'/'.join(parts[i:])}" for i in range(len(parts)))
    meant = next((each for each in right if each in known), None)
    if meant is None:
        return None
    base = "this server's address alone" if is_anthropic(meant) else "this server's address and /v1"
    return (
        f"{path} is not served; expected {meant}: the base URL of a client is {base}, without a final slash"
    )


OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/api/version", "/openapi.json", *PAGES})
CLIENT_CLOSED = 499  # nginx's status for a client disconnect, seen only in logs and metrics


def create_app(service: Service) -> ASGIApp:
    """The application for a service whose engine may still be loading."""
    metrics = Metrics(service)
    api = FastAPI(
        title="Farthing",
        version=farthing.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the Location would name this server's own address to a gateway's clients
        root_path=service.config.root_path,
        servers=[{"url": service.config.root_path}] if service.config.root_path else None,
        openapi_url=None,  # see `_add_document`
        responses=ERRORS,
    )
    _add_state_routes(api, service)
    _add_model_routes(api, service)
    pulls.add_routes(api, service)  # before the page, whose route has all other paths
    api.router.routes.extend(service.page)
    metrics.add_routes(api)
    add_routes(api, service)
    _add_document(api)
    paths = frozenset(path for route in api.routes if (path := getattr(route, "path", None)))
    _add_error_handlers(api, paths)
    return guarded(api, service.config, metrics.http_requests, paths, service.cache_digest)


def guarded(
    app: ASGIApp,
    config: ServerConfig,
    count: Counter,
    paths: frozenset[str],
    digest: CacheDigest | None = None,
) -> ASGIApp:
    """An application behind the checks of bodies, keys and origins. count: of answers, by path and status."""
    app = Bodies(app, config.max_body_bytes, config.body_timeout, digest)
    app = Access(app, config, OPEN_PATHS)
    if config.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],  # SDKs send a dozen of their own, and new ones with every release
            expose_headers=["*"],  # no credentials of the browser are involved, so that * means all
        )
    return Answers(app, count, paths)


def _add_document(api: FastAPI) -> None:
    """Serve the OpenAPI document, written once and in a thread: it takes a third of a second."""
    written: asyncio.Future[bytes] | None = None

    @api.get("/openapi.json", include_in_schema=False)
    async def document() -> Response:
        nonlocal written
        if written is None:
            written = asyncio.ensure_future(asyncio.to_thread(lambda: json.dumps(api.openapi()).encode()))
        return Response(await asyncio.shield(written), media_type="application/json")


def _add_state_routes(api: FastAPI, service: Service) -> None:
    @api.head("/health", include_in_schema=False)
    @api.get("/health", summary="Whether the process is alive")
    async def health() -> Response:
        reason = service.broken()
        if reason is not None:
            raise ApiError(503, reason, code="engine_failed")
        return JSONResponse({"status": "ok"})

    @api.head("/ready", include_in_schema=False)
    @api.get(
        "/ready", summary="Whether requests are accepted: the model is loaded and the server is not draining"
    )
    async def ready() -> Response:
        service.require_engine()
        return JSONResponse({"status": "ready"})

    @api.get("/api/version", summary="The version of this server, as Ollama's API tells it")
    @api.get("/version", summary="The version of this server")
    async def version() -> Response:
        return JSONResponse({"version": farthing.__version__})


def model_entry(name: str, created: int, root: str, length: int | None) -> dict[str, Any]:
    """An entry of /v1/models. length: tokens of context, if known."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "farthing",
        "type": "model",  # from here to created_at: for Anthropic's SDK
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
        "root": root,
        "max_model_len": length,
        "max_input_tokens": length,
        "max_tokens": length,
    }


def model_list(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body of /v1/models."""
    pages = {"has_more": False, "first_id": entries[0]["id"], "last_id": entries[-1]["id"]}
    return {"object": "list", "data": entries, **pages}


def _add_model_routes(api: FastAPI, service: Service) -> None:
    def describe(name: str) -> dict[str, Any]:
        length = service.engine.config.max_model_len if service.engine else None
        return model_entry(name, service.created, service.names[0], length)

    @api.get("/v1/models", summary="The models served")
    async def models() -> Response:
        return JSONResponse(model_list(list(map(describe, service.names))))

    @api.get("/v1/models/{model:path}", summary="One model")
    async def model(model: str) -> Response:
        if not model:
            raise HTTPException(404)
        return JSONResponse(describe(service.check_model(model)))


def _add_error_handlers(api: FastAPI, paths: Collection[str]) -> None:
    @api.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response(request.scope)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        content_type = request.headers.get("content-type")
        return describe_validation(list(error.errors()), content_type).response(request.scope)

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path, status = request.url.path, error.status_code
        if status == 400 and error.detail == "There was an error parsing the body":
            return describe_unparsed(error.__cause__).response(request.scope)
        absent = (reason(path) or misplaced(path, paths)) if status in (404, 405) else None
        if absent is not None:
            return ApiError(404, absent, code="unknown_url").response(request.scope)
        why = f"{request.method} {path}: {error.detail}"
        problem = ApiError(status, why, code="unknown_url" if status == 404 else None)
        response = problem.response(request.scope)
        response.headers.update(error.headers or {})
        return response

    @api.exception_handler(ClientGone)
    async def gone(_: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error; the server's log has the details").response(request.scope)
