"""/v1/responses: OpenAI's newer API, with and without streaming, and a bounded store of earlier answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Body, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from farthing.conversation.arguments import parsed
from farthing.conversation.types import (
    Answer,
    CallArguments,
    CallStart,
    Conversation,
    Delta,
    Reasoning,
    Text,
    ToolCall,
    collect,
)
from farthing.conversation.types import Turn as ChatTurn
from farthing.engine.request import StructuredOutputsParams
from farthing.server.api.responses_protocol import (
    CustomTool,
    InputTokensRequest,
    ResponsesRequest,
    conversation_of,
    resolved,
    turns_of,
)
from farthing.server.errors import ApiError, Documented
from farthing.server.memory import Stored
from farthing.server.sampling import with_defaults
from farthing.server.schema import RESPONSES, short
from farthing.server.service import Service
from farthing.server.stream import Ending, named, to_json
from farthing.server.turn import Turn, TurnRequest, Update, events_of

# The input items of a stored response, for clients that did not keep the conversation themselves.

_MAX_LIMIT = 100
_Entry = tuple[str, ChatTurn, int]  # prefix of its id, and the turn; of a call: its position in the turn


def input_items(stored: Stored, limit: int, order: str, after: str | None) -> dict[str, Any]:
    """A page of what a response continued, earlier responses included. Raises ApiError (400).

    Items are made of the conversation's turns, and their ids of the position, so every call gives the same.
    """
    if not 1 <= limit <= _MAX_LIMIT:
        raise _invalid("limit", limit, f"1 to {_MAX_LIMIT}")
    if order not in ("asc", "desc"):
        raise _invalid("order", order, "'asc' or 'desc'")
    suffix = stored.document["id"].removeprefix("resp_")
    entries = [entry for turn in stored.turns[:-1] for entry in _entries(turn)]
    step = 1 if order == "asc" else -1
    positions = range(len(entries))[::step]
    if after is not None:
        at = _position(after)
        if at not in positions or _id(entries[at], suffix, at) != after:
            raise _invalid("after", after, "the id of an input item of this response")
        positions = positions[positions.index(at) + 1 :]
    data = [{"id": _id(entries[at], suffix, at)} | _item(entries[at]) for at in positions[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(positions) > limit,
    }


def _entries(turn: ChatTurn) -> Iterator[_Entry]:
    if turn.reasoning:
        yield "rs", turn, 0
    if turn.role == "tool":
        yield "fco", turn, 0
    elif turn.text or not (turn.reasoning or turn.calls):
        yield "msg", turn, 0
    for number in range(len(turn.calls)):
        yield "fc", turn, number


def _item(entry: _Entry) -> dict[str, Any]:
    kind, turn, number = entry
    done = {"status": "completed"}
    match kind:
        case "rs":
            content = [{"type": "reasoning_text", "text": turn.reasoning}]
            return done | {"type": "reasoning", "summary": [], "content": content}
        case "fco":
            return done | {"type": "function_call_output", "call_id": turn.call_id, "output": turn.text}
        case "fc":
            call = turn.calls[number]
            named = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
            return done | {"type": "function_call"} | named
        case _:
            part: dict[str, Any] = {"type": "input_text", "text": turn.text}
            if turn.role == "assistant":
                part = {"type": "output_text", "text": turn.text, "annotations": []}
            return done | {"type": "message", "role": turn.role, "content": [part]}


def _id(entry: _Entry, suffix: str, position: int) -> str:
    return f"{entry[0]}_{suffix}_{position}"


def _position(identity: str) -> int:
    number = identity.rpartition("_")[2]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 9 else -1


def _invalid(name: str, value: object, accepted: str) -> ApiError:
    return ApiError(400, f"{name}: got {value!r}; expected {accepted}", param=name, code="invalid_value")


_NOT_STORED = (
    "response {} is not stored; expected the id of a recent response, created with the same key and "
    "without `store: false`"
)
_FAILURES = {"server_error", "rate_limit_exceeded"}  # OpenAI's codes of failed responses that occur here


async def respond(service: Service, body: ResponsesRequest, request: Request, client: str) -> Response:
    """Answer a request, streamed or as one document. Raises ApiError, ClientGone."""
    engine = service.require_engine()
    model = service.check_model(body.model)
    body, turns, conversation = _conversation(service, body, client)
    fields = {"temperature": body.temperature, "top_p": body.top_p}
    turn = Turn(
        service,
        TurnRequest(
            conversation=conversation,
            sampling=with_defaults(fields, engine.default_sampling) | {"max_tokens": body.max_output_tokens},
            structured=_structured(body),
            thinking_budget=body.max_thinking_tokens,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            stream=bool(body.stream),
            truncate=body.truncation == "auto",
            names=RESPONSES,
        ),
        client,
    )

    def keep(document: dict[str, Any], answer: Answer) -> None:
        if body.store is not False:
            service.responses.put(client, (*turns, _said(answer)), document)

    await turn.begin()
    envelope = _envelope(body, model, int(time.time()))
    return await turn.answer(request, _Writer(turn, body, envelope, keep))


async def count_tokens(service: Service, body: InputTokensRequest, client: str) -> Response:
    """How many tokens a request's prompt has."""
    service.check_model(body.model)
    _, _, conversation = _conversation(service, body, client)
    if not conversation.turns:
        raise ApiError(400, "input is missing", param="input", code="missing_required_parameter")
    truncate = body.truncation == "auto"
    request = TurnRequest(conversation=conversation, truncate=truncate, names=RESPONSES)
    tokens = await Turn(service, request, client).count()
    document = {"object": "response.input_tokens", "input_tokens": tokens}
    return Response(to_json(document), media_type="application/json")


def _conversation(
    service: Service, body: ResponsesRequest, client: str
) -> tuple[ResponsesRequest, tuple[ChatTurn, ...], Conversation]:
    """The body without references, the turns of earlier responses and its own, and the whole conversation."""
    body = resolved(body, lambda identity: service.responses.item(client, identity))
    earlier: tuple[ChatTurn, ...] = ()
    if (identity := body.previous_response_id) is not None:
        found = service.responses.get(client, identity)
        if found is None:
            code = "previous_response_not_found"
            raise ApiError(400, _NOT_STORED.format(short(identity)), param="previous_response_id", code=code)
        earlier = found.turns
    turns = (*earlier, *turns_of(body, earlier))
    return body, turns, conversation_of(body, turns)


def stored(service: Service, client: str, identity: str) -> Stored:
    """An earlier response of this client. Raises ApiError (404)."""
    found = service.responses.get(client, identity)
    if found is None:
        raise ApiError(404, _NOT_STORED.format(short(identity)))
    return found


def _structured(body: ResponsesRequest) -> StructuredOutputsParams | None:
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=form.json_schema)


def _said(answer: Answer) -> ChatTurn:
    return ChatTurn(
        "assistant", answer.text, answer.reasoning, tuple(ToolCall(*call) for call in answer.calls)
    )


def _envelope(body: ResponsesRequest, model: str, created: int) -> dict[str, Any]:
    """The fields of a response that repeat its request."""
    given = body.model_dump(
        by_alias=True, exclude_none=True, include={"tools", "tool_choice", "text", "reasoning"}
    )
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None} | given.get("reasoning", {}),
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}} | given.get("text", {}),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


@dataclass(slots=True)
class _Open:
    """The item being written."""

    item: dict[str, Any]
    kind: str  # reasoning, message, function_call or custom_tool_call
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Everything written so far."""
        return "".join(self.pieces)


class _Writer:
    """Converts updates to output items and their events; without streaming, only to the items."""

    pieced = False

    def __init__(
        self,
        turn: Turn,
        body: ResponsesRequest,
        envelope: dict[str, Any],
        keep: Callable[[dict[str, Any], Answer], None],
    ) -> None:
        self._turn, self._envelope, self._keep = turn, envelope, keep
        self.ending = Ending("", self.failed)
        self._tools = {declared.name: declared for declared in body.declared()}
        self._number = -1  # of the last event
        self._output: list[dict[str, Any]] = []  # items that are complete
        self._open: _Open | None = None
        self._deltas: list[Delta] = []

    async def whole(self) -> dict[str, Any]:
        """The complete document."""
        (update,) = await self._turn.whole()
        for delta in update.deltas:
            self._delta(delta)
        self._close("incomplete" if update.finish == "length" else "completed")
        return self._document(update)

    def stream(self) -> AsyncIterator[str]:
        """SSE events, one string per engine output."""
        return events_of(self._turn, self.opening, self._delta, self._end)

    def _end(self, update: Update) -> list[str]:
        status = "incomplete" if update.finish == "length" else "completed"
        events = self._close(status)
        return [*events, self._event(f"response.{status}", response=self._document(update))]

    def opening(self) -> str:
        """The first events; empty if they were sent."""
        if self._number >= 0:
            return ""
        kinds = ("response.created", "response.in_progress")
        return "".join(self._event(kind, response=self._envelope) for kind in kinds)

    def failed(self, error: ApiError) -> str:
        """The last event of a failed stream."""
        code = error.code if error.code in _FAILURES else "server_error"
        why = {"code": code, "message": error.message}
        document = self._envelope | {"status": "failed", "error": why, "output": self._output}
        return self._event("error", **why, param=error.param) + self._event(
            "response.failed", response=document
        )

    def _document(self, update: Update) -> dict[str, Any]:
        usage, cut = self._turn.usage, update.finish == "length"
        document = self._envelope | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cache_write_tokens": 0, **usage.prompt_details},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        self._keep(document, collect(self._deltas))
        return document

    # items

    def _delta(self, delta: Delta) -> list[str]:
        self._deltas.append(delta)
        match delta:
            case Reasoning(text):
                events = self._start("reasoning", {"summary": [], "content": []})
                return [*events, self._piece("reasoning_text", text)]
            case Text(text):
                events = self._start("message", {"role": "assistant", "content": []})
                return [*events, self._piece("output_text", text)]
            case CallStart(_, identity, name):
                return [*self._close(), *self._start(*self._call(identity, name))]
            case CallArguments(_, text):
                return self._argument(text)

    def _call(self, identity: str, name: str) -> tuple[str, dict[str, Any]]:
        """The kind of a call's item, and its fields."""
        fields = {"call_id": identity, "name": name}
        declared = self._tools.get(name)
        if declared is not None and declared.namespace is not None:
            fields |= {"name": declared.tool.name, "namespace": declared.namespace}
        if declared is not None and isinstance(declared.tool, CustomTool):
            return "custom_tool_call", fields | {"input": ""}
        return "function_call", fields | {"arguments": ""}

    def _start(self, kind: str, fields: dict[str, Any]) -> list[str]:
        """Begin an item of this kind unless one is open."""
        if self._open is not None and self._open.kind == kind:
            return []
        events = self._close()
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc", "custom_tool_call": "ctc"}[kind]
        item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"} | fields
        self._open = _Open(item, kind)
        events.append(self._event("response.output_item.added", output_index=len(self._output), item=item))
        if kind in ("reasoning", "message"):
            events.append(self._here("response.content_part.added", part=_part(kind, ""), content_index=0))
        return events

    def _piece(self, kind: str, text: str) -> str:
        assert self._open is not None
        self._open.pieces.append(text)
        extra: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        return self._here(f"response.{kind}.delta", delta=text, content_index=0, **extra)

    def _argument(self, text: str) -> list[str]:
        assert self._open is not None
        self._open.pieces.append(text)
        if self._open.kind == "custom_tool_call":  # its text is in a JSON string, complete only at the end
            return []
        return [self._here("response.function_call_arguments.delta", delta=text)]

    def _close(self, status: str = "completed") -> list[str]:
        """End the open item, if any."""
        if self._open is None:
            return []
        kind, text = self._open.kind, self._open.text
        events: list[str] = []
        done: dict[str, Any] = {"status": status}
        if kind in ("reasoning", "message"):
            part = _part(kind, text)
            name = part["type"]
            extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            events.append(self._here(f"response.{name}.done", text=text, content_index=0, **extra))
            events.append(self._here("response.content_part.done", part=part, content_index=0))
            done["content"] = [part]
        elif kind == "function_call":
            name = self._open.item["name"]
            events.append(self._here("response.function_call_arguments.done", arguments=text, name=name))
            done["arguments"] = text
        else:
            done["input"] = _input(text)
            events.append(self._here("response.custom_tool_call_input.delta", delta=done["input"]))
            events.append(self._here("response.custom_tool_call_input.done", input=done["input"]))
        item = self._open.item | done
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=item))
        self._output.append(item)
        self._open = None
        return events

    def _here(self, kind: str, **fields: Any) -> str:
        """An event about the open item."""
        assert self._open is not None
        return self._event(kind, item_id=self._open.item["id"], output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return named(kind, {"type": kind, "sequence_number": self._number} | fields)


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _input(arguments: str) -> str:
    """The text argument of a custom tool, or its beginning; anything else is passed on unchanged."""
    text = (parsed(arguments) or {}).get("input")
    return text if isinstance(text, str) else arguments


# the routes


def add_routes(api: FastAPI, service: Service, streamed: Documented) -> None:
    """Add this API's routes. streamed: describes their answers in the OpenAPI document."""

    @api.post("/v1/responses", summary="Answer items of a conversation", responses=streamed)
    async def create(request: Request, body: ResponsesRequest = Body()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        return await respond(service, body, request, request.scope["client_name"])

    @api.post("/v1/responses/input_tokens", summary="How many tokens a conversation has")
    async def count(request: Request, body: InputTokensRequest = Body()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        return await count_tokens(service, body, request.scope["client_name"])

    @api.get("/v1/responses/{identity}", summary="An earlier answer")
    async def response(request: Request, identity: str, stream: bool = False) -> Response:
        if stream:
            raise ApiError(400, "stream: got true; expected false: earlier answers are whole", param="stream")
        return JSONResponse(stored(service, request.scope["client_name"], identity).document)

    @api.get("/v1/responses/{identity}/input_items", summary="What an earlier answer continued")
    async def items(
        request: Request, identity: str, limit: int = 20, order: str = "desc", after: str | None = None
    ) -> Response:
        earlier = stored(service, request.scope["client_name"], identity)
        return JSONResponse(input_items(earlier, limit, order, after))

    @api.post("/v1/responses/{identity}/cancel", summary="Not supported: no answer is made in the background")
    async def cancel(request: Request, identity: str) -> Response:
        stored(service, request.scope["client_name"], identity)
        raise ApiError(400, "only background responses can be cancelled, and there are none here")

    @api.delete("/v1/responses/{identity}", summary="Delete an earlier answer")
    async def forget(request: Request, identity: str) -> Response:
        stored(service, request.scope["client_name"], identity)
        service.responses.delete(request.scope["client_name"], identity)
        return JSONResponse({"id": identity, "object": "response", "deleted": True})
