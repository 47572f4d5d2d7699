"""The HTTP application: routes, middleware, and the endpoints that are too small for a file."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Body, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import farthing
from farthing.conversation.types import Conversation
from farthing.prompts import BLOCK
from farthing.server.access import Access, Viewer
from farthing.server.api.messages import count_tokens, messages
from farthing.server.api.messages_protocol import CountRequest, MessagesError, MessagesRequest
from farthing.server.api.openai import chat, complete, tool_of, turns_of
from farthing.server.api.openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    TokenizeRequest,
)
from farthing.server.api.responses import count_tokens as count_input
from farthing.server.api.responses import input_items, respond, stored
from farthing.server.api.responses_protocol import InputTokensRequest, ResponsesRequest
from farthing.server.bodies import Bodies
from farthing.server.cache_digest import KeepBody
from farthing.server.dashboard.site import DATA_PATH, HEADERS, PREFIX, Asset, Dashboard, assets
from farthing.server.dashboard.source import service_data, visible_to
from farthing.server.errors import ApiError
from farthing.server.jobs import ClientGone
from farthing.server.metrics import CountRequests, Metrics
from farthing.server.schema import describe_unparsed, describe_validation
from farthing.server.service import Service
from farthing.server.stream import PiecedAnswer, Pieces, to_json
from farthing.server.turn import render

# Every response carries an id of its request, under the names that the publishers' SDKs read.

_FIELDS = (b"x-request-id", b"request-id")  # OpenAI's, Anthropic's
_USABLE = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """ASGI middleware that adds the client's own X-Request-Id, or a new id, to the response's head."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request and name it in its response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(_FIELDS[0], b"")
        identity = given if _USABLE.fullmatch(given) else f"req_{uuid.uuid4().hex}".encode()

        async def name(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((field, identity) for field in _FIELDS)]
            await send(message)

        await self.app(scope, receive, name)


# Endpoints of OpenAI's and Anthropic's APIs that do not exist here, with the reasons.

_STATELESS = "nothing is stored between requests except recent responses"
_TEXT = "the model reads and writes text only"
# Prefixes of paths, as far as a reason applies to all paths below.
_REASONS = {
    "/v1/responses/compact": "compaction of responses: send shorter input, or truncation = 'auto'",
    "/v1/conversations": f"conversations: {_STATELESS}; use previous_response_id, or send all items in input",
    "/v1/messages/batches": "message batches: send each request to /v1/messages",
    "/v1/batches": "batches: send each request itself",
    "/v1/complete": "Anthropic's text completions: use /v1/messages",
    "/v1/embeddings": "embeddings: the model is a causal language model",
    "/v1/moderations": "moderations: the model is a causal language model",
    "/v1/rerank": "reranking: the model is a causal language model",
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
    "/v1/organization": "administration of organizations",
    "/v1/organizations": "administration of organizations",
}


def reason(path: str) -> str | None:
    """Why an endpoint does not exist; None if it belongs to no known API."""
    parts = path.rstrip("/").split("/")
    for length in range(len(parts), 2, -1):
        if (why := _REASONS.get("/".join(parts[:length]))) is not None:
            return f"{path} is not served: {why}"
    return None


# `GET /cache/digest`: the prompts in the prefix cache and the load, for gateways.
#
# With the digest one can test guesses at cached prompts, so it requires permission to read all metrics.


def mount_cache_digest(api: FastAPI, service: Service) -> None:
    """Add the route."""

    @api.get("/cache/digest", summary="Blocks of prompt text in the prefix cache, for gateways")
    async def digest(request: Request) -> Response:
        if not request.scope["viewer"].everything:
            raise ApiError(403, "the cache digest is for metrics and admin keys", code="forbidden")
        return JSONResponse(await document(service))


async def document(service: Service) -> dict[str, Any]:
    """The digest: `blocks` are 64-bit little-endian integers in base64, of `block` bytes of text each."""
    engine = service.require_engine()
    blocks = await service.cache_digest.blocks(engine)
    snapshot = engine.stats.snapshot()
    return {
        "block": BLOCK,
        "blocks": base64.b64encode(struct.pack(f"<{len(blocks)}Q", *blocks)).decode(),
        "requests": snapshot.num_requests_running + snapshot.num_requests_waiting,
        "waiting_bytes": round(snapshot.num_requests_waiting * service.cache_digest.mean_bytes),
    }


# The dashboard in a FastAPI application.

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


OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/openapi.json", *assets()})
CLIENT_CLOSED = 499  # nginx's status for a client disconnect, seen only in logs and metrics
_ERRORS = (400, 401, 404, 405, 408, 413, 429, 500, 503, 504)
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/json": {}, "text/event-stream": {}},
        "description": "One document, or a stream",
    }
}


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
        responses={status: {"model": ErrorResponse} for status in _ERRORS},
    )
    _add_state_routes(api, service, metrics)
    _add_model_routes(api, service)
    _add_generation_routes(api, service)
    _add_responses_routes(api, service)
    _add_messages_routes(api, service)
    _add_token_routes(api, service)
    mount(
        api,
        lambda: service_data(service),
        lambda request, document: visible_to(request.scope["viewer"], document),
    )
    mount_cache_digest(api, service)
    _add_document(api)
    _add_error_handlers(api)
    paths = frozenset(path for route in api.routes if (path := getattr(route, "path", None)))
    app: ASGIApp = Bodies(KeepBody(api), service.config.max_body_bytes, service.config.body_timeout)
    app = Access(app, service.config, OPEN_PATHS)
    if service.config.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=service.config.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],  # SDKs send a dozen of their own, and new ones with every release
            expose_headers=["*"],  # no credentials of the browser are involved, so that * means all
        )
    return CountRequests(RequestIds(app), metrics, paths)


def _add_document(api: FastAPI) -> None:
    """Serve the OpenAPI document, written once and in a thread: it takes a third of a second."""
    written: asyncio.Future[bytes] | None = None

    @api.get("/openapi.json", include_in_schema=False)
    async def document() -> Response:
        nonlocal written
        if written is None:
            written = asyncio.ensure_future(asyncio.to_thread(lambda: to_json(api.openapi()).encode()))
        return Response(await asyncio.shield(written), media_type="application/json")


def _add_state_routes(api: FastAPI, service: Service, metrics: Metrics) -> None:
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

    @api.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def scrape(request: Request) -> Response:
        viewer: Viewer = request.scope["viewer"]
        return Response(
            metrics.render(accounts=viewer.everything), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @api.get("/version", summary="The version of this server")
    async def version() -> Response:
        return JSONResponse({"version": farthing.__version__})


def _add_model_routes(api: FastAPI, service: Service) -> None:
    def describe(name: str) -> dict[str, Any]:
        length = service.engine.config.max_model_len if service.engine else None
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "farthing",
            "type": "model",  # from here to created_at: for Anthropic's SDK
            "display_name": name,
            "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
            "root": service.names[0],
            "max_model_len": length,
            "max_input_tokens": length,
            "max_tokens": length,
        }

    @api.get("/v1/models", summary="The models served")
    async def models() -> Response:
        pages = {"has_more": False, "first_id": service.names[0], "last_id": service.names[-1]}
        return JSONResponse({"object": "list", "data": list(map(describe, service.names)), **pages})

    @api.get("/v1/models/{model:path}", summary="One model")
    async def model(model: str) -> Response:
        return JSONResponse(describe(service.check_model(model)))


def _add_generation_routes(api: FastAPI, service: Service) -> None:
    @api.post("/v1/completions", summary="Complete prompts", responses=_STREAMED)
    async def completions(request: Request, body: CompletionRequest = Body()) -> Response:
        await service.check_fields(body, request)
        return await complete(service, body, request, request.scope["client_name"])

    @api.post("/v1/chat/completions", summary="Answer a conversation", responses=_STREAMED)
    async def chat_completions(request: Request, body: ChatCompletionRequest = Body()) -> Response:
        await service.check_fields(body, request)
        return await chat(service, body, request, request.scope["client_name"])


def _add_responses_routes(api: FastAPI, service: Service) -> None:
    @api.post("/v1/responses", summary="Answer items of a conversation", responses=_STREAMED)
    async def responses(request: Request, body: ResponsesRequest = Body()) -> Response:
        await service.check_fields(body, request)
        return await respond(service, body, request, request.scope["client_name"])

    @api.post("/v1/responses/input_tokens", summary="How many tokens a conversation has")
    async def count(request: Request, body: InputTokensRequest = Body()) -> Response:
        await service.check_fields(body, request)
        return await count_input(service, body, request.scope["client_name"])

    @api.get("/v1/responses/{identity}", summary="An earlier answer")
    async def response(request: Request, identity: str, stream: bool = False) -> Response:
        if stream:
            raise ApiError(400, "stream: got true; expected false: earlier answers are whole", param="stream")
        return JSONResponse(stored(service, request.scope["client_name"], identity).document)

    @api.get("/v1/responses/{identity}/input_items", summary="What an earlier answer continued")
    async def items(
        request: Request, identity: str, limit: int = 20, order: str = "desc", after: str | None = None
    ) -> Response:
        found = stored(service, request.scope["client_name"], identity)
        return JSONResponse(input_items(found, limit, order, after))

    @api.post("/v1/responses/{identity}/cancel", summary="Not supported: no answer is made in the background")
    async def cancel(request: Request, identity: str) -> Response:
        stored(service, request.scope["client_name"], identity)
        raise ApiError(400, "only background responses can be cancelled, and there are none here")

    @api.delete("/v1/responses/{identity}", summary="Delete an earlier answer")
    async def forget(request: Request, identity: str) -> Response:
        stored(service, request.scope["client_name"], identity)
        service.responses.delete(request.scope["client_name"], identity)
        return JSONResponse({"id": identity, "object": "response", "deleted": True})


def _add_messages_routes(api: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = {status: {"model": MessagesError} for status in _ERRORS}

    @api.post(
        "/v1/messages",
        summary="Answer a conversation, as Anthropic's API does",
        responses=errors | _STREAMED,
    )
    async def create(request: Request, body: MessagesRequest = Body()) -> Response:
        await service.check_fields(body, request)
        return await messages(service, body, request, request.scope["client_name"])

    @api.post("/v1/messages/count_tokens", summary="Number of tokens in a conversation", responses=errors)
    async def count(request: Request, body: CountRequest = Body()) -> Response:
        await service.check_fields(body, request)
        return await count_tokens(service, body, request.scope["client_name"])


def _add_token_routes(api: FastAPI, service: Service) -> None:
    @api.post("/tokenize", summary="Text or a conversation to token ids")
    async def tokenize(request: Request, body: TokenizeRequest = Body()) -> Response:
        await service.check_fields(body, request)
        engine = service.require_engine()
        service.check_model(body.model)
        client = request.scope["client_name"]
        if body.messages is None:
            ids = await service.encode(body.prompt or "", body.add_special_tokens, client)
        else:
            conversation = Conversation(
                turns=turns_of(body.messages),
                tools=tuple(map(tool_of, body.tools or ())),
                generate=body.add_generation_prompt,
            )
            prompt = await render(service, conversation, client)
            ids = await service.encode(prompt, False, client, "messages")
        document: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": engine.config.max_model_len,
            "tokens": Pieces(ids),
        }
        if body.return_token_strs and engine.tokenizer:
            text = engine.tokenizer.token_text
            document["token_strs"] = Pieces(map(text, ids))
        return PiecedAnswer(document, service.turns, client, service.config.request_timeout)

    @api.post("/detokenize", summary="Token ids to text")
    async def detokenize(request: Request, body: DetokenizeRequest = Body()) -> Response:
        await service.check_fields(body, request)
        service.check_model(body.model)
        return JSONResponse({"prompt": await service.decode(body.tokens, request.scope["client_name"])})


def _add_error_handlers(api: FastAPI) -> None:
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
        absent = reason(path) if status in (404, 405) else None
        if absent is not None:
            return ApiError(404, absent, code="unknown_url").response(request.scope)
        why = f"{request.method} {path}: {error.detail}"
        found = ApiError(404, why, code="unknown_url") if status == 404 else ApiError(status, why)
        response = found.response(request.scope)
        response.headers.update(error.headers or {})
        return response

    @api.exception_handler(ClientGone)
    async def gone(_: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error; the server's log has the details").response(request.scope)
