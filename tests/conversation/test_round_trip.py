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
from farthing.conversation.types import Conversation, Text, Tool, ToolCall, Turn
from farthing.engine.tokenizer import Tokenizer
from tests.conversation.published import SHAPES
from tests.conversation.talks import NAMES, TEXTS
from tests.conversation.test_parse import answer, chunked, read

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


# What models write instead of what the templates print.

ROME = [("send", {"city": "Rome"})]
DEVIATIONS = {
    "a brace is missing": (
        "hermes",
        '<tool_call>\n{"name": "send", "arguments": {"city": "Rome"}\n</tool_call>',
    ),
    "a brace too many": ("hermes", '<tool_call>{"name": "send", "arguments": {"city": "Rome"}}}</tool_call>'),
    "never closed": ("hermes", '<tool_call>{"name": "send", "arguments": {"city": "Rome"}}'),
    "a list": ("hermes", '<tool_call>[{"name": "send", "arguments": {"city": "Rome"}}]</tool_call>'),
    "arguments first": ("hermes", '<tool_call>{"arguments": {"city": "Rome"}, "name": "send"}</tool_call>'),
    "arguments as text": (
        "hermes",
        '<tool_call>{"name": "send", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
    ),
    "no outer tag": (
        "qwen3_coder",
        "<function=send>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
    ),
    "on one line": (
        "qwen3_coder",
        "<tool_call><function=send><parameter=city>Rome</parameter></function></tool_call>",
    ),
    "JSON": ("qwen3_coder", '<tool_call>\n{"name": "send", "arguments": {"city": "Rome"}}\n</tool_call>'),
    "an id": ("mistral", '[TOOL_CALLS]send[CALL_ID]a1b2c3d4e[ARGS]{"city": "Rome"}'),
    "no separator": ("mistral", '[TOOL_CALLS]send{"city": "Rome"}'),
    "a type": ("llama3_json", '{"type": "function", "name": "send", "parameters": {"city": "Rome"}}'),
    "a token": ("llama3_json", '<|python_tag|>{"name": "send", "parameters": {"city": "Rome"}}'),
    "a list of Granite's": ("granite", '<|tool_call|>[{"name": "send", "arguments": {"city": "Rome"}}]'),
}


@pytest.mark.parametrize("case", DEVIATIONS)
def test_deviations_are_read_at_every_split(case: str) -> None:
    form, said = DEVIATIONS[case]
    for cut in range(len(said) + 1):
        text, calls = read(CALLS[form].calls(TOOLS), [said[:cut], said[cut:]])
        assert (text, calls) == ("", ROME)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("llama3_json", '{"name": "Ada", "age": 36}'),
        ("llama3_json", '{"name": "unknown", "parameters": {}}'),
        ("llama3_json", '{"a": 1}'),
        ("llama3_json", "{"),
        ("llama3_json", 'So: {"name": "send", "parameters": {}}'),
        ("qwen3_coder", "Write <function=NAME> before it."),
        ("mistral", "a[1] = [TOOL"),
    ],
)
def test_answers_that_are_no_calls_stay_text(form: str, said: str) -> None:
    for chunks in ([said], list(said)):
        assert read(CALLS[form].calls(TOOLS), chunks) == (said, [])


@pytest.mark.parametrize("form", ["hermes", "qwen3_coder", "minimax_m2"])
def test_a_mention_of_the_tag_does_not_hold_the_answer_back(form: str) -> None:
    opener = next(tag for tag in sorted(CALLS[form].markup) if tag.endswith("tool_call>") and "/" not in tag)
    parser = CALLS[form].calls(TOOLS)
    shown = [*parser.push(f"Use {opener} as"), *parser.push(" a tag, "), *parser.push("and so on.")]
    assert "".join(delta.text for delta in shown if isinstance(delta, Text)).endswith("and so on.")
