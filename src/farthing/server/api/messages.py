"""/v1/messages: Anthropic's API, with and without streaming, and its count_tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from fastapi import Body, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from farthing.conversation.arguments import ObjectText, as_object, parsed
from farthing.conversation.types import (
    CallArguments,
    CallStart,
    Conversation,
    Delta,
    Reasoning,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
)
from farthing.conversation.types import Turn as ChatTurn
from farthing.engine.request import StructuredOutputsParams
from farthing.server.api.messages_protocol import (
    CLIENT_TOOLS,
    CountRequest,
    InputMessage,
    MessagesError,
    MessagesRequest,
    RedactedBlock,
    TextBlock,
    ThinkingBlock,
    ToolDefinition,
    ToolResultBlock,
    ToolUseBlock,
    texts,
)
from farthing.server.errors import STATUSES, ApiError, Documented, anthropic_payload
from farthing.server.formats import thinking_of
from farthing.server.sampling import IssuedCalls, with_defaults
from farthing.server.schema import MESSAGES, FieldNames
from farthing.server.service import Service
from farthing.server.stream import Ending, named, to_json
from farthing.server.turn import Turn, TurnRequest, Update, events_of

_UNSIGNED = "unsigned"  # instead of a signature, which is not checked when clients send it back
_PING = named("ping", {"type": "ping"})
ANTHROPIC = Ending("", lambda error: named("error", anthropic_payload(error)), _PING)


async def messages(service: Service, body: MessagesRequest, request: Request, client: str) -> Response:
    """Answer a request, streamed or as one document. Raises ApiError, ClientGone."""
    engine = service.require_engine()
    model = service.check_model(body.model)
    fields = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "max_tokens": body.max_tokens,
    }
    turn = Turn(
        service,
        TurnRequest(
            conversation=conversation_of(body),
            sampling=with_defaults(fields, engine.default_sampling),
            structured=None
            if body.answer_schema is None
            else StructuredOutputsParams(json=body.answer_schema),
            thinking_budget=body.thinking.budget_tokens if body.thinking else None,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            stream=bool(body.stream),
            names=_names(body),
            ignored=() if _thinking(body)[1] else ("thinking.type",),
        ),
        client,
    )
    await turn.begin()
    return await turn.answer(request, _Writer(turn, model))


async def count_tokens(service: Service, body: CountRequest, client: str) -> Response:
    """The number of tokens in a request's prompt."""
    service.check_model(body.model)
    request = TurnRequest(conversation=conversation_of(body), names=_names(body))
    tokens = await Turn(service, request, client).count()
    return Response(to_json({"input_tokens": tokens}), media_type="application/json")


# the request


def _thinking(body: CountRequest) -> tuple[bool | None, bool]:
    return thinking_of(body.thinking.type if body.thinking else None)


def _names(body: CountRequest) -> FieldNames:
    return replace(MESSAGES, structured="output_format.schema") if body.output_format else MESSAGES


def conversation_of(body: CountRequest) -> Conversation:
    """The conversation in a body. Raises ApiError (400)."""
    turns = [ChatTurn("system", text)] if (text := body.system_text) else []
    issued = IssuedCalls()
    for position, message in enumerate(body.messages):
        for turn in _turns(message, position, issued):
            issued.issue(turn)
            turns.append(turn)
    choice = body.tool_choice
    effort = body.output_config.effort if body.output_config else None
    last = turns[-1] if turns else None
    return Conversation(
        turns=tuple(turns),
        tools=tuple(map(_tool, body.tools or ())),
        choice=_choice(body),
        parallel_calls=not (choice and choice.disable_parallel_tool_use),
        thinking=_thinking(body)[0],
        effort=effort,
        resume=last is not None and last.role == "assistant" and not last.calls,
    )


def _tool(tool: ToolDefinition) -> Tool:
    known = CLIENT_TOOLS.get(tool.type or "")
    if known is None:
        return Tool(tool.name, tool.description, tool.input_schema, tool.strict)
    return Tool(tool.name, known.description, known.schema, tool.strict)


def _choice(body: CountRequest) -> ToolChoice:
    choice = body.tool_choice
    if choice is None or choice.type == "auto":
        return ToolChoice()
    if choice.type == "tool":
        return ToolChoice("required", (choice.name or "",), single=True)
    return ToolChoice("required" if choice.type == "any" else "none")


def _turns(message: InputMessage, position: int, issued: IssuedCalls) -> list[ChatTurn]:
    """The turns of a message: a user's tool results are separate turns."""
    if isinstance(message.content, str):
        return [ChatTurn(message.role, message.content)]
    if message.role == "assistant":
        return [_assistant(message, position)]
    if not message.content:
        raise ApiError(
            400,
            f"messages[{position}].content: got []; expected a string or at least one block",
            param=f"messages[{position}].content",
            code="invalid_value",
        )
    turns: list[ChatTurn] = []
    said: list[TextBlock] = []  # since the last result
    for number, block in enumerate(message.content):
        if isinstance(block, TextBlock):
            said.append(block)
            continue
        if not isinstance(block, ToolResultBlock):
            raise _misplaced(block.type, message.role, position)
        issued.answer(block.tool_use_id, f"messages[{position}].content[{number}].tool_use_id")
        turns += [ChatTurn(message.role, texts(said))] if said else []
        turns.append(ChatTurn("tool", block.text, call_id=block.tool_use_id))
        said = []
    return [*turns, ChatTurn(message.role, texts(said))] if said else turns


def _assistant(message: InputMessage, position: int) -> ChatTurn:
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    assert not isinstance(message.content, str)
    for block in message.content:
        match block:
            case TextBlock():
                text.append(block.text)
            case ThinkingBlock():
                reasoning.append(block.thinking)
            case ToolUseBlock():
                calls.append(ToolCall(block.id, block.name, json.dumps(block.input, ensure_ascii=False)))
            case RedactedBlock():
                pass
            case _:
                raise _misplaced(block.type, "assistant", position)
    return ChatTurn("assistant", "".join(text), "".join(reasoning), tuple(calls))


def _misplaced(kind: str, role: str, position: int) -> ApiError:
    return ApiError(
        400,
        f"messages[{position}] has role {role!r} and a block of type {kind!r}; this block needs another role",
        param=f"messages[{position}].content",
        code="invalid_value",
    )


# the answer


class _Blocks:
    """Numbers the blocks that deltas belong to, in the order in which they are written."""

    def __init__(self) -> None:
        self._number, self._kind = 0, ""

    def __call__(self, delta: Delta) -> int:
        """The number of a delta's block."""
        match delta:
            case Reasoning():
                kind = "thinking"
            case Text():
                kind = "text"
            case _:
                kind = "tool_use"
        if kind != self._kind or isinstance(delta, CallStart):
            self._number += 1
        self._kind = kind
        return self._number


def _block(deltas: list[Delta]) -> dict[str, Any]:
    """The block that consists of these deltas."""
    text = "".join(delta.text for delta in deltas if not isinstance(delta, CallStart))
    match deltas[0]:
        case CallStart(_, identity, name):
            value = parsed(as_object(text) or "{}")
            return {"type": "tool_use", "id": identity, "name": name, "input": value}
        case Reasoning():
            return {"type": "thinking", "thinking": text, "signature": _UNSIGNED}
        case _:
            return {"type": "text", "text": text}


class _Writer:
    """Converts updates to Anthropic's documents and events."""

    ending, pieced = ANTHROPIC, False

    def __init__(self, turn: Turn, model: str) -> None:
        self._turn = turn
        self._message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._opened = False
        self._arguments = ObjectText()  # of the open block, if that is a call
        self._index = -1  # of the open block
        self._kind = ""  # of the open block; empty: none is open

    # whole

    async def whole(self) -> dict[str, Any]:
        """The complete document."""
        (update,) = await self._turn.whole()
        content = [_block(list(deltas)) for _, deltas in groupby(update.deltas, _Blocks())]
        return self._message | {"content": content, **_stop(update), "usage": self._usage()}

    # streamed

    def stream(self) -> AsyncIterator[str]:
        """SSE events, one string per engine output."""
        return events_of(self._turn, self.opening, self._delta, self._end)

    def opening(self) -> str:
        """The first events; empty if they were sent. Before the first output, the number of cached tokens is
        not known: the usage at the end of the stream has it."""
        if self._opened:
            return ""
        self._opened = True
        message = self._message | {"usage": self._usage() | {"output_tokens": 0}}
        return named("message_start", {"type": "message_start", "message": message}) + _PING

    def _delta(self, delta: Delta) -> list[str]:
        match delta:
            case Reasoning(text):
                start = self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return [*start, self._piece({"type": "thinking_delta", "thinking": text})]
            case Text(text):
                return [
                    *self._open("text", {"type": "text", "text": ""}),
                    self._piece({"type": "text_delta", "text": text}),
                ]
            case CallStart(_, identity, name):
                block = {"type": "tool_use", "id": identity, "name": name, "input": {}}
                opened = [*self._close(), *self._open("tool_use", block)]
                self._arguments = ObjectText()
                return opened
            case CallArguments(_, text):
                return self._argument(self._arguments.push(text))

    def _argument(self, text: str) -> list[str]:
        return [self._piece({"type": "input_json_delta", "partial_json": text})] if text else []

    def _open(self, kind: str, block: dict[str, Any]) -> list[str]:
        if self._kind == kind:
            return []
        closed = self._close()
        self._index, self._kind = self._index + 1, kind
        event = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*closed, named("content_block_start", event)]

    def _close(self) -> list[str]:
        if not self._kind:
            return []
        pieces: list[str] = []
        if self._kind == "thinking":
            pieces = [self._piece({"type": "signature_delta", "signature": _UNSIGNED})]
        elif self._kind == "tool_use":
            pieces = self._argument(self._arguments.close())
        self._kind = ""
        return [*pieces, named("content_block_stop", {"type": "content_block_stop", "index": self._index})]

    def _piece(self, delta: dict[str, Any]) -> str:
        event = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return named("content_block_delta", event)

    def _end(self, update: Update) -> list[str]:
        event = {"type": "message_delta", "delta": _stop(update), "usage": self._usage()}
        return [
            *self._close(),
            named("message_delta", event),
            named("message_stop", {"type": "message_stop"}),
        ]

    def _usage(self) -> dict[str, Any]:
        usage = self._turn.usage
        missed = usage.prompt_details
        cached = missed.pop("cached_tokens")
        return {
            "input_tokens": usage.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "input_tokens_details": missed,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        }


def _stop(update: Update) -> dict[str, Any]:
    if update.finish == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(update.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": update.stop_reason}
    return {"stop_reason": "tool_use" if update.calls else "end_turn", "stop_sequence": None}


# the routes


def add_routes(api: FastAPI, service: Service, streamed: Documented) -> None:
    """Add this API's routes. streamed: describes their answers in the OpenAPI document."""
    errors: Documented = {status: {"model": MessagesError} for status in STATUSES}

    @api.post(
        "/v1/messages",
        summary="Answer a conversation, as Anthropic's API does",
        responses=errors | streamed,
    )
    async def create(request: Request, body: MessagesRequest = Body()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        return await messages(service, body, request, request.scope["client_name"])

    @api.post("/v1/messages/count_tokens", summary="Number of tokens in a conversation", responses=errors)
    async def count(request: Request, body: CountRequest = Body()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        return await count_tokens(service, body, request.scope["client_name"])
