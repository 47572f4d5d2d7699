"""A call that a published template prints is parsed back to the same call, by the parser chosen for it."""

from __future__ import annotations

import json
from itertools import takewhile
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models

from farthing.conversation.formats.template import arguments
from farthing.conversation.output import OutputParser
from farthing.conversation.select import CALLS, Checkpoint, choose
from farthing.conversation.types import Conversation, Tool, ToolCall, Turn
from farthing.engine.tokenizer import Tokenizer
from tests.conversation.published import SHAPES
from tests.conversation.talks import NAMES, TEXTS
from tests.conversation.test_parse import answer, chunked

BACKEND = HfTokenizer(models.WordLevel({"x": 0}, unk_token="x"))
KINDS: dict[str, Any] = {
    "city": {"type": "string"},
    "days": {"type": "array", "items": {}},
    "limit": {"type": "integer"},
    "exact": {"type": "boolean"},
    "unit": {"type": ["string", "null"]},
    "where": {"$ref": "#/$defs/where"},
}
SCHEMA = {"type": "object", "properties": KINDS, "$defs": {"where": {"type": "object"}}}
TOOLS = tuple(Tool(name, "Looks é up.", SCHEMA) for name in NAMES)
LISTS: tuple[list[Any], ...] = ([], [1, {"deep": [None, "日"]}])
CHOICES: dict[str, tuple[Any, ...]] = {
    "city": (*TEXTS, "", "5", "null", "</tool", "[TOOL", "\n"),
    "days": LISTS,
    "limit": (0, -3),
    "exact": (True, False),
    "unit": ("c", None),
    "where": ({}, {"a": {"b": ["c", '"}]']}}),
}
# Their calls are not parsed yet.
SPOKEN = sorted(name for name, shape in SHAPES.items() if shape.tools and name not in ("gpt_oss", "gemma4"))
WRITTEN = {
    "minimax_m2": "minimax_m2",
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_next": "hermes",
    "smollm3": "hermes",
    "hermes": "hermes",
    "qwen3_coder": "qwen3_coder",
    "qwen3_5": "qwen3_coder",
    "mistral_7b": "mistral_list",
    "mistral_small": "mistral_list",
    "mistral_small_4": "mistral",
    "granite": "granite",
    "llama3_1": "llama3_json",
}


def _called(random: Random, most: int) -> tuple[ToolCall, ...]:
    calls = []
    for index in range(random.randint(1, most)):
        chosen = {key: random.choice(CHOICES[key]) for key in KINDS if random.random() < 0.6}
        name = random.choice(NAMES)
        calls.append(ToolCall(f"functions.{name}:{index}", name, json.dumps(chosen, ensure_ascii=False)))
    return tuple(calls)


@pytest.mark.parametrize("name", SPOKEN)
def test_calls_are_parsed_back(name: str) -> None:
    source, random = SHAPES[name].source, Random(name)
    ours = Tokenizer(BACKEND, {"bos_token": "<s>", "eos_token": "</s>"}, chat_template=source)
    chosen = choose(Checkpoint("", source, source.__contains__, ours.habits())).tools
    user = Turn("user", "Where?")
    for _ in range(20):
        calls = _called(random, 1 if name == "llama3_1" else 3)
        asked = Conversation((user,), TOOLS)
        told = Conversation((user, Turn("assistant", "", "", calls)), TOOLS, generate=False)
        before, whole = (ours.render_chat(**arguments(talk, source)) for talk in (asked, told))
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
        said = whole[len(list(same)) :]
        cuts = [random.randrange(1_000) for _ in range(6)]
        for chunks in ([said], list(said), chunked(said, cuts)):
            found = answer(OutputParser(chosen.calls(TOOLS), chosen.tags), chunks)
            assert [(called, json.loads(text)) for _, called, text in found.calls] == [
                (call.name, json.loads(call.arguments)) for call in calls
            ]
            assert not any(key in found.text for key in (*NAMES, *KINDS, "tool_call", "invoke", "TOOL"))


def test_the_format_of_calls_is_chosen_by_the_template() -> None:
    for name, expected in WRITTEN.items():
        chosen = choose(Checkpoint("", SHAPES[name].source, lambda _: False))
        assert chosen.tools.calls is CALLS[expected].calls, name
        assert chosen.tools.syntax is CALLS[expected].syntax and chosen.tools.markup == CALLS[expected].markup
