"""Random conversations, and the messages with which a client of transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any, Literal

from farthing.conversation.types import Conversation, Tool, ToolCall, Turn

TEXTS = (
    "Hi", "Rome?", "Zürich, 5 < 7 & 'so' on", 'She said "no" — 日本語 🎉', "two\nlines\n", "  padded ",
    "a\\b\tc",    "{{ x }} {% if %}", "0", "Überlänge " * 6,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    "text", "é \"q\" <x>", 3, 2.5, True, None, [], {}, [1, {"deep": [None, "日"]}], {"a": {"b": ["c"]}},
    "", "5",
)  # fmt: skip
NAMES = ("look_up", "add", "send")
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Größe & Ort"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "unit": {"type": ["string", "null"], "enum": ["c", "f"], "default": None},
    },
    "required": ["city"],
}


def talks(seed: int, count: int, *, tools: bool = True, systems: bool = True) -> Iterator[Conversation]:
    """Conversations of one to four requests: with tool loops, reasoning and switches, or without."""
    random = Random(seed)
    for _ in range(count):
        yield _talk(random, tools, systems)


def _talk(random: Random, tools: bool, systems: bool) -> Conversation:
    turns = [Turn("system", random.choice(TEXTS))] if systems and random.random() < 0.6 else []
    offered = tuple(_tool(random, name) for name in NAMES[: random.randrange(4)]) if tools else ()
    rounds, made = random.randint(1, 4), 0
    for number in range(rounds):
        turns.append(Turn("user", random.choice(TEXTS)))
        for _ in range(random.randrange(3) if offered else 0):
            calls = tuple(
                _call(random, random.choice(offered).name, made + place)
                for place in range(random.randint(1, 2))
            )
            made += len(calls)
            turns.append(Turn("assistant", random.choice(("", *TEXTS)), _reasoning(random), calls))
            turns += (Turn("tool", random.choice(TEXTS), call_id=call.id) for call in calls)
        if number + 1 < rounds or random.random() < 0.3:
            turns.append(Turn("assistant", random.choice(TEXTS), _reasoning(random)))
    last = turns[-1].role == "assistant"
    thinking = random.choice((None, None, True, False))
    return Conversation(tuple(turns), offered, thinking=thinking, generate=not last)


def _reasoning(random: Random) -> str:
    return random.choice(("", "", "Hm.", "First é,\nthen 日."))


def _tool(random: Random, name: str) -> Tool:
    return Tool(name, random.choice(("Looks é up.", 'A "tool"\nof two lines')), SCHEMA)


def _call(random: Random, name: str, index: int) -> ToolCall:
    chosen = random.sample(("city", "days", "unit", "ключ"), random.randrange(4))
    arguments = {key: random.choice(VALUES) for key in chosen}
    return ToolCall(f"functions.{name}:{index}", name, json.dumps(arguments, ensure_ascii=False))


def messages(
    talk: Conversation, arguments: Literal["object", "text"], random: Random
) -> list[dict[str, Any]]:
    """A conversation in the form that transformers documents; the text of a turn that only calls may be
    empty, null or missing."""
    found = []
    for turn in talk.turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.call_id is not None:
            message["tool_call_id"] = turn.call_id
        if turn.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.loads(call.arguments) if arguments == "object" else call.arguments,
                    },
                }
                for call in turn.calls
            ]
            if not turn.text:
                message |= random.choice(({"content": ""}, {"content": None}))
                if random.random() < 0.3:
                    del message["content"]
        found.append(message)
    return found


def declared(talk: Conversation) -> list[dict[str, Any]] | None:
    """The tools of a conversation as transformers documents them."""
    return [{"type": "function", "function": tool.document()} for tool in talk.offered] or None
