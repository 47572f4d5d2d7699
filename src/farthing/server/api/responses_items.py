"""The input items of a stored response, for clients that did not keep the conversation themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from farthing.conversation.types import Turn
from farthing.server.api.responses_store import Stored
from farthing.server.errors import ApiError

_MAX_LIMIT = 100
_Entry = tuple[str, Turn, int]  # prefix of its id, and the turn; of a call: its position in the turn


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


def _entries(turn: Turn) -> Iterator[_Entry]:
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
