"""`farthing serve --models`: one address for several models, each of which has a server process of its own.

Requests are forwarded to the process of the model that they name, which is loaded if it is not. Lists of
models, and loading and unloading, are answered here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import farthing
from farthing.exchange import ReplicaLost, Upstream, end_to_end, holder, named, request_headers
from farthing.process import loop_factory
from farthing.server.api.ollama import document_of, running, seconds, shown, tag
from farthing.server.app import guarded, misplaced, model_entry, model_list, reason
from farthing.server.config import ADMIN_ENVIRONMENT, ENVIRONMENT, Given, ServerConfig
from farthing.server.dashboard.site import HEADERS, assets
from farthing.server.errors import CODE_HEADER, ApiError, Passage, send_error
from farthing.server.pool import Hosted, Pool, PoolConfig
from farthing.server.presets import read_models
from farthing.server.run import listed, listen, say_where, server_of, url_of
from farthing.server.schema import short, wrong_type

log = logging.getLogger("farthing.server")

_CONNECT, _SILENCE = 2.0, 660.0  # seconds: of a connection, and of an answer, which the model's server bounds
_CREDENTIALS = ("authorization", "x-api-key")
_TRIES = 2  # if the process ended before it had the request
# Paths that are forwarded. Others are errors of the front, as they would be of any model's server.
_FORWARDED = frozenset(
    f"/v1/{path}"
    for path in (
        *("completions", "chat/completions", "responses", "responses/input_tokens", "messages"),
        *("messages/count_tokens", "embeddings", "rerank"),
    )
) | {"/tokenize", "/detokenize", "/rerank"}
_FORWARDED |= {f"/api/{path}" for path in ("chat", "generate", "embed", "embeddings")}
_WATCHED = frozenset({"/metrics", "/openapi.json", "/dashboard/data", "/cache/digest"})  # of a loaded model


class Front:
    """The state of the server in front: what `run.Server` drains."""

    def __init__(self, config: ServerConfig, pool: Pool, page: Sequence[Route] = ()) -> None:
        self.config, self.pool, self.page = config, pool, page
        self.created = int(time.time())
        self.upstream = Upstream(_CONNECT, _SILENCE)
        self.draining = False

    async def drain(self) -> bool:
        """Refuse new requests, let running ones finish, and stop the models."""
        self.draining = True
        return await self.pool.drain()

    def model(self, name: object) -> Hosted:
        """The model of that name. Raises ApiError: 400 without a name, 404 for an unknown one."""
        models = self.pool.models
        expected = f"expected one of {', '.join(map(repr, models))}"
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name is None:
            raise ApiError(
                400, f"model is missing; {expected}", param="model", code="missing_required_parameter"
            )
        if isinstance(name, str) and (found := models.get(name) or models.get(name.removesuffix(":latest"))):
            return found
        raise ApiError(404, f"model: got {short(name)}; {expected}", param="model", code="model_not_found")

    def describe(self, model: Hosted) -> dict[str, Any]:
        """An entry of /v1/models."""
        entry = model_entry(model.name, self.created, model.name, model.sized.engine.max_model_len)
        entry |= {"state": model.state, "size": model.size}
        if model.state == "loading":
            entry["progress"] = model.lines[-1] if model.lines else "starting"
        if model.state == "failed":
            entry["error"] = model.error
        return entry


class _Forward:
    """ASGI application: forwards a request to the model that it is for."""

    def __init__(self, front: Front, known: frozenset[str]) -> None:
        self._front, self._known = front, known

    async def __call__(self, scope: Scope, receive: Receive, send_part: Send) -> None:
        started = False

        async def write(message: Any) -> None:
            nonlocal started
            started = True
            await send_part(message)

        try:
            body = await _whole(receive)
            work = asyncio.ensure_future(self._answer(scope, body, write))
            gone = asyncio.ensure_future(_disconnected(receive))
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not work.done():  # closes the connection to the model's server, which then ends the request
                work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        except ApiError as error:
            if not started:
                await send_error(error, scope, receive, send_part)

    async def _answer(self, scope: Scope, body: bytes, write: Send) -> None:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        passed = request_headers(headers, (scope.get("client") or ["unknown"])[0])
        query = scope["query_string"].decode("latin-1")
        target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        if scope["path"] in _WATCHED:
            return await self._watch(
                await self._model(scope, None, query, passed), scope, target, passed, write
            )
        document = _document(passed, body) if scope["method"] == "POST" and body else None
        keep = seconds(document.get("keep_alive")) if document and scope["path"].startswith("/api/") else None
        for attempt in range(1, _TRIES + 1):
            model = await self._model(scope, document, query, passed)
            try:
                async with self._front.pool.use(model, scope["client_name"], keep) as url:
                    await self._relay(model, url, scope, target, passed, body, write)
                return None
            except ReplicaLost as problem:
                if problem.reached or attempt == _TRIES:
                    # The problem names addresses of this machine, which are for the log alone.
                    log.warning("%s: a request was lost: %s", model.name, problem)
                    why = f"model: {model.name}: its process ended"
                    raise ApiError(503, why, code="model_lost", retry_after=1) from problem
            await self._front.pool.ended(model)
        return None

    async def _watch(self, model: Hosted, scope: Scope, target: str, passed: Any, write: Send) -> None:
        """What a model reports of itself: it is neither loaded for it nor kept."""
        if model.state != "loaded" or model.server is None:
            why = f"model: {model.name} is {model.state}; expected a loaded one"
            raise ApiError(404, why, param="model", code="model_not_loaded")
        if scope["viewer"].everything:  # as if the request came from this machine
            passed = {name: value for name, value in passed.items() if name.lower() in _CREDENTIALS}
        try:
            await self._relay(model, model.server.url, scope, target, passed, b"", write)
        except ReplicaLost as problem:
            log.warning("%s: a request was lost: %s", model.name, problem)
            why = f"model: {model.name}: its process ended"
            raise ApiError(503, why, code="model_lost", retry_after=1) from problem

    async def _relay(
        self, model: Hosted, url: str, scope: Scope, target: str, headers: Any, body: bytes, write: Send
    ) -> None:
        """Raises ReplicaLost while the client has received nothing."""
        answer = await self._front.upstream.send(url, scope["method"], target, headers, body)
        try:
            if answer.status == 503 and answer.headers.get(CODE_HEADER) == "engine_failed":
                self._front.pool.broken(model)
            data = await answer.part()
            raw = [
                (k.lower().encode(), v.encode("latin-1"))
                for k, v in end_to_end(answer.headers.items()).items()
            ]
            if (length := answer.headers.get("Content-Length")) is not None:
                raw.append((b"content-length", length.encode()))
            await write({"type": "http.response.start", "status": answer.status, "headers": raw})
            passage = Passage(answer.headers, scope["path"])
            try:
                while data:
                    await write({"type": "http.response.body", "body": data, "more_body": True})
                    passage.passed(data)
                    data = await answer.part()
            except ReplicaLost as problem:
                log.warning("%s: an answer was cut off: %s", model.name, problem)
                ending = passage.ending("the model's process ended")
                if ending is None:
                    raise ConnectionAbortedError(str(problem)) from problem
                await write({"type": "http.response.body", "body": ending, "more_body": True})
            await write({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            answer.close()

    async def _model(
        self, scope: Scope, document: Mapping[str, Any] | None, query: str, headers: Any
    ) -> Hosted:
        """The model that a request is for. Raises ApiError."""
        front, path = self._front, scope["path"]
        if path not in _FORWARDED | _WATCHED and named(path) is None:
            why = reason(path) or misplaced(path, self._known) or f"{scope['method']} {path}: Not Found"
            raise ApiError(404, why, code="unknown_url")
        if document is not None:
            return front.model(document.get("model"))
        if chosen := parse_qs(query).get("model"):
            return front.model(chosen[0])
        loaded = sorted(
            (each for each in front.pool.models.values() if each.state == "loaded" and each.server),
            key=lambda each: -each.used,
        )
        if (identity := named(path)) is not None:
            urls = [each.server.url for each in loaded if each.server]
            found = await holder(front.upstream, urls, identity, headers)
            loaded = [] if found is None else [loaded[found]]
        if not loaded:
            raise ApiError(404, f"{path}: no model is loaded that has it", code="model_not_loaded")
        return loaded[0]


def _document(headers: Mapping[str, str], body: bytes) -> Mapping[str, Any]:
    """The object of a body that is declared as JSON. Raises ApiError (400)."""
    declared = headers.get("Content-Type")
    if not (declared or "").partition(";")[0].strip().lower().endswith(("/json", "+json")):
        raise wrong_type(declared)
    return document_of(body)


async def _whole(receive: Receive) -> bytes:
    """The body, which `Bodies` has read."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# What is answered here.


class _Collector(Collector):
    """Metrics of the front; those of a model are at /metrics?model=NAME while it is loaded."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterable[Metric]:
        """All metric families."""
        pool = self._pool
        state = GaugeMetricFamily("farthing:model_state", "1 for its state.", labels=["model_name", "state"])
        size = GaugeMetricFamily("farthing:model_bytes", "Memory that it has.", labels=["model_name"])
        for model in pool.models.values():
            state.add_metric([model.name, model.state], 1.0)
            size.add_metric([model.name], float(model.held))
        yield state
        yield size
        yield GaugeMetricFamily("farthing:models_limit_bytes", "Memory of all models.", pool.config.limit)
        yield GaugeMetricFamily("farthing:models_waiting", "Requests that wait for a model.", pool.waiting)
        yield CounterMetricFamily("farthing:model_loads", "Processes started.", pool.loads)
        yield CounterMetricFamily("farthing:model_unloads", "Processes ended on purpose.", pool.unloads)


class _Answers:
    """What the front answers itself: the models, their pages, Ollama's lists, and loading on request."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        """A route each."""
        return [
            *(Route(path, self.page) for path in assets()),
            *(Route(path, self.alive) for path in ("/health", "/ready")),
            *(Route(path, self.version) for path in ("/version", "/api/version")),
            *(Route(path, self.tags) for path in ("/api/tags", "/api/ps")),
            *(Route(path, self.show, methods=["POST"]) for path in ("/api/show", "/api/pull")),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            *(Route(path, self.change, methods=["POST"]) for path in ("/models/load", "/models/unload")),
        ]

    async def models(self, _: Request) -> Response:
        front = self._front
        return JSONResponse(model_list([front.describe(each) for each in front.pool.models.values()]))

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._front.describe(self._front.model(request.path_params["model"])))

    async def change(self, request: Request) -> Response:
        front = self._front
        if not request.scope["viewer"].everything:
            raise ApiError(403, "models are loaded and unloaded with an admin key", code="forbidden")
        chosen = front.model(_document(request.headers, await request.body()).get("model"))
        if request.url.path == "/models/load":
            await front.pool.load(chosen, request.scope["client_name"])
        else:
            front.pool.unload(chosen)
        return JSONResponse(front.describe(chosen))

    async def alive(self, _: Request) -> Response:
        if self._front.draining:
            raise ApiError(503, "the server is shutting down", code="not_ready", retry_after=5)
        return JSONResponse({"status": "ok"})

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": farthing.__version__})

    async def page(self, request: Request) -> Response:
        asset = assets()[request.url.path]
        return Response(asset.body, media_type=asset.content_type, headers=HEADERS)

    async def tags(self, request: Request) -> Response:
        hosted = list(self._front.pool.models.values())
        if request.url.path == "/api/tags":
            return JSONResponse({"models": list(map(self._entry, hosted))})
        now = time.monotonic()
        return JSONResponse({"models": [
            running(self._entry(each), each.kept_until - now, each.sized.engine.max_model_len)
            for each in hosted if each.state == "loaded"
        ]})  # fmt: skip

    async def show(self, request: Request) -> Response:
        document = _document(request.headers, await request.body())
        chosen = self._front.model(document.get("model") or document.get("name"))
        if request.url.path == "/api/pull":
            return JSONResponse({"status": "success"})
        capabilities = await asyncio.to_thread(lambda: chosen.sized.preset.capabilities)
        engine = chosen.sized.engine
        return JSONResponse(shown(self._entry(chosen), engine.model, engine.max_model_len, capabilities))

    def _entry(self, model: Hosted) -> dict[str, Any]:
        preset = model.sized.preset
        return tag(model.name, preset.stored, preset.type, model.size, self._front.created)


def create_front(front: Front) -> ASGIApp:
    """The application in front of the models of a pool."""
    registry = CollectorRegistry()
    registry.register(_Collector(front.pool))
    labels = ["path", "status"]
    count = Counter("farthing:http_requests", "HTTP requests answered.", labels, registry=registry)

    async def metrics(request: Request) -> Response | _Forward:
        if request.query_params.get("model") is not None:
            return forward
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def failed(request: Request, error: Exception) -> Response:
        if not isinstance(error, ApiError):
            error = ApiError(500, "internal error; the server's log has the details")
        return error.response(request.scope)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await front.pool.start()
        yield
        front.upstream.close()

    routes = [Route("/metrics", metrics), *_Answers(front).routes(), *front.page]
    known = _FORWARDED | _WATCHED | {route.path for route in routes}
    forward = _Forward(front, known)
    routes.append(Route("/{path:path}", forward))
    app = Starlette(
        routes=routes, exception_handlers={ApiError: failed, Exception: failed}, lifespan=lifespan
    )
    app.router.redirect_slashes = False
    return guarded(app, front.config, count, known)


def serve_models(
    config: ServerConfig,
    source: Path,
    given: Given,
    memory: str | None,
    unload_after: float,
    page: Sequence[Route] = (),
) -> int:
    """Serve the models of a folder or a file until SIGTERM or Ctrl-C; returns the exit status.

    Raises OSError if the address is in use, and ValueError for models that cannot be served.
    """
    if unload_after < 0:
        raise ValueError(f"unload_after: got {unload_after:g}; expected seconds, 0 or more")
    models, limit = read_models(source, given, memory)
    rings = {ENVIRONMENT: given.keys, ADMIN_ENVIRONMENT: given.admin_keys}
    environment = {name: "\n".join([*keys, os.environ.get(name, "")]) for name, keys in rings.items()}
    pool = Pool(models, PoolConfig(limit=limit, idle=unload_after), environment)
    with (
        listen(config.host, config.port) as listener,
        listed(listener, str(source)),
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        front = Front(config, pool, page)
        log.info("listening on %s", url_of(listener))
        for model in pool.models.values():
            log.info("model %s: %.1f GB", model.name, model.size / 1e9)
        say_where(url_of(listener), models[0].preset.name, config)
        runner.run(server_of(create_front(front), front).serve([listener]))
    return 0
