"""The HTTP application: routes and middleware."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from fastapi import Body, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

import farthing
from farthing.conversation.types import Conversation
from farthing.server.absent import reason as absent_reason
from farthing.server.access import Access, Viewer
from farthing.server.api.cache_digest import mount as mount_digest
from farthing.server.api.messages import count_tokens, messages
from farthing.server.api.messages_protocol import CountRequest, MessagesError, MessagesRequest
from farthing.server.api.openai_chat import chat, tool_of, turns_of
from farthing.server.api.openai_completions import complete
from farthing.server.api.responses import count_tokens as count_input
from farthing.server.api.responses import respond, stored
from farthing.server.api.responses_items import input_items
from farthing.server.api.responses_protocol import InputTokensRequest, ResponsesRequest
from farthing.server.bodies import Bodies
from farthing.server.cache_digest import KeepBody
from farthing.server.dashboard import assets, service_data, visible_to
from farthing.server.dashboard.router import mount
from farthing.server.errors import ApiError
from farthing.server.events import to_json
from farthing.server.invalid import describe_unparsed, describe_validation
from farthing.server.jobs import ClientGone
from farthing.server.metrics import CountRequests, Metrics
from farthing.server.pieces import PiecedAnswer, Pieces
from farthing.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    TokenizeRequest,
)
from farthing.server.request_ids import RequestIds
from farthing.server.service import Service
from farthing.server.turns import render

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
    mount_digest(api, service)
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
        absent = absent_reason(path) if status in (404, 405) else None
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
