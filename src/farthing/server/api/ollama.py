"""/api/…: Ollama's API, for clients that speak no other. Chats and prompts take the path of /v1.

Options that mean nothing here are ignored and named in a header; images are refused.
"""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import pydantic_core
from fastapi import Body as FromBody
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from farthing.checkpoint.reader import stored_as
from farthing.conversation.arguments import as_object, parsed
from farthing.conversation.types import Conversation, Reasoning, Text, Tool, ToolCall, collect
from farthing.conversation.types import Turn as ChatTurn
from farthing.server.api.ollama_protocol import ApiRequest, ChatRequest, GenerateRequest, NamedRequest
from farthing.server.api.openai_protocol import OllamaError
from farthing.server.errors import STATUSES, ApiError, Documented
from farthing.server.formats import IGNORED_HEADER, ModelFormats, made_for
from farthing.server.sampling import IssuedCalls, chat_logprobs, with_defaults
from farthing.server.service import Service
from farthing.server.stream import Ending, texts, to_json
from farthing.server.turn import Turn, TurnRequest, Update
from farthing.server.work import encode

_OLLAMA = Ending("", lambda error: f"{to_json({'error': error.message})}\n", "", "application/x-ndjson")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST = 64  # characters of a duration: the search for its parts takes quadratic time
FOREVER = timedelta(days=36_500)  # of keep_alive below 0, for clients that expect a date


def seconds(keep_alive: Any) -> float | None:
    """keep_alive, such as 300 or "5m", in seconds; below 0 for ever, and None as if it were absent."""
    forever = FOREVER.total_seconds()
    if isinstance(keep_alive, int | float):
        return float(keep_alive) if 0 <= keep_alive <= forever else forever
    if not isinstance(keep_alive, str) or len(keep_alive) > _LONGEST:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h|$)", keep_alive)
    if not parts:
        return None
    total = sum(float(number) * _UNITS.get(unit, 1.0) for number, unit in parts)
    return forever if keep_alive[:1] == "-" else min(total, forever)


# Conversations.


def conversation_of(body: ChatRequest) -> Conversation:
    """The conversation in a body. Raises ApiError (400) for results without a call."""
    issued, turns = IssuedCalls(), []
    for position, message in enumerate(body.messages):
        calls = tuple(
            ToolCall(call.id or "", call.function.name, _text(call.function.arguments))
            for call in message.tool_calls
        )
        name = message.tool_name or message.name
        turn = ChatTurn(message.role, message.content, message.thinking, calls, message.tool_call_id, name)
        turns.append(issued.add(turn, f"messages[{position}].tool_call_id"))
    functions = [tool.function for tool in body.tools]
    tools = tuple(Tool(f.name, f.description, f.parameters, f.strict) for f in functions)
    return Conversation(tuple(turns), tools, **body.thinking)


def _text(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


class _RawTurn(Turn):
    """A prompt that is no conversation."""

    async def _write(self, formats: ModelFormats, conversation: Conversation) -> None:
        (turn,) = conversation.turns
        (ids,) = await encode(self._service, [turn.text], True, self._client, "prompt")
        self._conversation, self._prompt = conversation, turn.text
        self._tokenized = replace(self._tokenized, ids=ids)


class _Writer:
    """Converts updates to Ollama's documents, one a line."""

    ending, opening = _OLLAMA, None

    def __init__(self, turn: Turn, body: ApiRequest, service: Service) -> None:
        self._turn, self._model, self._chat = turn, body.model, isinstance(body, ChatRequest)
        self._probable, self._service = body.probable, service
        self.pieced = body.probable is not None
        self._began = time.monotonic_ns()

    async def whole(self) -> dict[str, Any]:
        """The complete document."""
        (update,) = await self._turn.whole()
        answer = collect(update.deltas)
        document = self._document(answer.text, answer.reasoning, answer.calls) | self._end(update)
        return document | self._probabilities(update)

    async def stream(self) -> AsyncIterator[str]:
        """Lines, one string per engine output. Calls follow when they are complete."""
        calls: list[Any] = []
        async for updates in self._turn.updates():
            (update,) = updates
            lines = []
            for delta in update.deltas:
                match delta:
                    case Text(text):
                        lines.append(self._document(text))
                    case Reasoning(text):
                        lines.append(self._document("", text))
                    case _:
                        calls.append(delta)
            if update.finish is not None:
                if calls:
                    lines.append(self._document("", "", collect(calls).calls))
                lines.append(self._document("") | self._end(update))
            if self.pieced:
                if update.tokens:
                    lines = lines or [self._document("")]  # of tokens whose text is held back
                    lines[0] |= self._probabilities(update)
                written = chain.from_iterable(map(_line, lines))
                async for piece in self._service.piece_writer.pieces(written, self._turn.job.client):
                    yield piece
            elif lines:
                yield "".join(f"{to_json(line)}\n" for line in lines)

    def _probabilities(self, update: Update) -> dict[str, Any]:
        if self._probable is None:
            return {}
        named = chat_logprobs(update.logprobs or [], self._probable, self._service.token_texts())
        return {"logprobs": named["content"]}

    def _document(self, text: str, thinking: str = "", calls: Any = ()) -> dict[str, Any]:
        document: dict[str, Any] = {"model": self._model, "created_at": _now(), "done": False}
        reasoning = {"thinking": thinking} if thinking else {}
        if not self._chat:
            return document | {"response": text, **reasoning}
        message: dict[str, Any] = {"role": "assistant", "content": text, **reasoning}
        if calls:
            message["tool_calls"] = [
                {"id": identity, "function": {"index": index, "name": name, "arguments": _object(arguments)}}
                for index, (identity, name, arguments) in enumerate(calls)
            ]
        return document | {"message": message}

    def _end(self, update: Update) -> dict[str, Any]:
        usage, spent = self._turn.usage, self._turn.usage.prompts[0]
        started = spent.first_scheduled_time or spent.arrival_time
        prompt, answer = spent.first_token_time - started, spent.finished_time - spent.first_token_time
        return {
            "done": True,
            "done_reason": "length" if update.finish == "length" else "stop",
            "total_duration": time.monotonic_ns() - self._began,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": max(1, int(prompt * 1e9)),  # clients divide by it
            "eval_count": usage.completion_tokens,
            "eval_duration": max(1, int(answer * 1e9)),
        }


def _line(document: Any) -> Iterator[str]:
    yield from texts(document)
    yield "\n"


def _object(arguments: str) -> Any:
    return parsed(as_object(arguments) or "{}")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def loaded_answer(document: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The answer to a request without messages or prompt, which loads or, by keep_alive, unloads a model."""
    empty = {"message": {"role": "assistant", "content": ""}} if path == "/api/chat" else {"response": ""}
    reason = "unload" if seconds(document.get("keep_alive")) == 0 else "load"
    return {
        "model": document.get("model"),
        "created_at": _now(),
        **empty,
        "done": True,
        "done_reason": reason,
    }


# Lists of models, also of several in one server.


def tag(name: str, stored: str, kind: str, size: int, created: float) -> dict[str, Any]:
    """A model in /api/tags and /api/ps. stored: the format of its files."""
    details = {"parent_model": "", "format": stored, "family": kind, "families": [kind]}
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(created, UTC).isoformat(),
        "size": size,
        "digest": sha256(f"{name} {kind}".encode()).hexdigest(),
        "details": details | {"parameter_size": "", "quantization_level": ""},
    }


def running(entry: Mapping[str, Any], left: float, context: int | None) -> dict[str, Any]:
    """A loaded model in /api/ps. left: seconds until it may be unloaded."""
    expires = datetime.now(UTC) + timedelta(seconds=min(left, FOREVER.total_seconds()))
    return {**entry, "expires_at": expires.isoformat(), "size_vram": 0, "context_length": context}


def shown(
    entry: Mapping[str, Any], model: str, context: int | None, capabilities: Sequence[str]
) -> dict[str, Any]:
    """A model in /api/show. capabilities: of conversations."""
    kind = entry["details"]["family"]
    return {
        "license": "",
        "modelfile": "",
        "parameters": "",
        "template": "",
        "modified_at": entry["modified_at"],
        "details": entry["details"],
        "model_info": {"general.architecture": kind, f"{kind}.context_length": context},
        "capabilities": ["embedding"] if made_for(model, "embed") else [*capabilities],
    }


# The routes.


async def _answered(
    service: Service, body: ApiRequest, request: Request, conversation: Conversation, raw: bool
) -> Response:
    """A turn's answer; raw: of a prompt that is continued, without a chat format."""
    engine, client = service.require_engine(), request.scope["client_name"]
    turn = (_RawTurn if raw else Turn)(
        service,
        TurnRequest(
            conversation=conversation,
            sampling=with_defaults(body.options.sampling, engine.default_sampling)
            | {"max_tokens": body.options.limit, "logprobs": body.probable},
            structured=body.structured,
            stream=body.stream,
            names=body.names,
        ),
        client,
    )
    writer = _Writer(turn, body, service)
    await turn.begin()
    response = await turn.answer(request, writer)
    if ignored := [*filter(None, [response.headers.get(IGNORED_HEADER)]), *body.ignored]:
        response.headers[IGNORED_HEADER] = ", ".join(ignored)
    return response


def add_routes(api: FastAPI, service: Service) -> None:
    """Add this API's routes."""
    errors: Documented = {status: {"model": OllamaError} for status in STATUSES}
    streamed: Documented = {200: {"content": {"application/json": {}, _OLLAMA.media_type: {}}}}

    def entries() -> list[dict[str, Any]]:
        engine = service.require_engine()
        stored, kind = stored_as(Path(engine.config.model)), engine.model_config.model_type
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return [tag(name, stored, kind, size, service.created) for name in service.names]

    @api.post("/api/chat", summary="Answer a conversation, as Ollama's API does", responses=errors | streamed)
    async def chat(request: Request, body: ChatRequest = FromBody()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        service.check_model(body.model)
        if not body.messages:
            return JSONResponse(loaded_answer(body.model_dump(), "/api/chat"))
        return await _answered(service, body, request, conversation_of(body), raw=False)

    @api.post(
        "/api/generate",
        summary="Answer or continue a prompt, as Ollama's API does",
        responses=errors | streamed,
    )
    async def generate(request: Request, body: GenerateRequest = FromBody()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        service.check_model(body.model)
        if not body.prompt:
            return JSONResponse(loaded_answer(body.model_dump(), "/api/generate"))
        turns = [ChatTurn("user", body.prompt)]
        if body.system and not body.raw:
            turns.insert(0, ChatTurn("system", body.system))
        conversation = Conversation(tuple(turns), **({} if body.raw else body.thinking))
        return await _answered(service, body, request, conversation, body.raw)

    @api.get("/api/tags", summary="The models served, as Ollama's API lists them", responses=errors)
    async def tags() -> Response:
        return JSONResponse({"models": entries()})

    @api.get("/api/ps", summary="The models loaded, as Ollama's API lists them", responses=errors)
    async def loaded() -> Response:
        context, left = service.require_engine().config.max_model_len, FOREVER.total_seconds()
        return JSONResponse({"models": [running(entry, left, context) for entry in entries()]})

    @api.post("/api/show", summary="One model, as Ollama's API describes it", responses=errors)
    async def show(body: NamedRequest = FromBody()) -> Response:
        name = service.check_model(body.wanted)
        entry = next(each for each in entries() if each["name"] == name)
        config, formats = service.require_engine().config, await service.formats()
        return JSONResponse(shown(entry, config.model, config.max_model_len, formats.capabilities))

    @api.post("/api/pull", summary="Whether a model is served; none is downloaded", responses=errors)
    async def pull(body: NamedRequest = FromBody()) -> Response:
        service.check_model(body.wanted)
        return JSONResponse({"status": "success"})


def document_of(body: bytes) -> Mapping[str, Any]:
    """The object of a body. Raises ApiError (400)."""
    try:
        document = pydantic_core.from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    return document if isinstance(document, dict) else {}
