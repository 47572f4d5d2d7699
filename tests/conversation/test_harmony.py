"""Harmony: prompts like those of gpt-oss's template, and answers in channels, cut anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.conversation.base import ControlTokens
from farthing.conversation.formats.harmony import HARMONY, MARKS
from farthing.conversation.formats.template import arguments
from farthing.conversation.jinja import compile_template, variables
from farthing.conversation.output import OutputParser
from farthing.conversation.scan import MARK
from farthing.conversation.select import Checkpoint, Habits, choose, probe
from farthing.conversation.types import Answer, Conversation, Tool, ToolCall, Turn, collect
from farthing.engine.tokenizer import Tokenizer
from tests.conversation.talks import talks
from tests.conversation.test_token_ids import byte_tokenizer

TOOL = Tool(
    "weather",
    "Weather of a city.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where"},
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            "days": {"type": "array", "items": {"type": "integer"}, "nullable": True},
        },
        "required": ["city"],
    },
)
DECLARED = """\
# Tools

## functions

namespace functions {

// Weather of a city.
type weather = (_: {
// Where
city: string,
unit?: "c" | "f", // default: c,
days?: number[] | null,
}) => any;

} // namespace functions"""


def system(effort: str = "medium", tools: bool = False) -> str:
    more = "\nCalls to these tools must go to the commentary channel: 'functions'." if tools else ""
    return (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        f"Knowledge cutoff: 2024-06\nCurrent date: {datetime.now():%Y-%m-%d}\n\nReasoning: {effort}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
        f"{more}<|end|>"
    )


def render(*turns: Turn, **more: Any) -> str:
    return HARMONY.render(Conversation(turns, **more), ControlTokens())


def test_prompt_of_a_tool_loop() -> None:
    calls = (ToolCall("1", "weather", '{"city":"Rome"}'), ToolCall("2", "weather", '{"city":"Oslo"}'))
    found = render(
        Turn("system", "Be brief."),
        Turn("user", "Rome, Oslo?"),
        Turn("assistant", "", "Two cities.", calls),
        Turn("tool", "sunny", call_id="1"),
        Turn("tool", 'so "so"', call_id="2"),
        tools=(TOOL,),
        effort="high",
    )
    assert found == (
        f"{system('high', True)}<|start|>developer<|message|># Instructions\n\nBe brief.\n\n{DECLARED}<|end|>"
        "<|start|>user<|message|>Rome, Oslo?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Two cities.<|end|>"
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|>'
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"so \\"so\\""<|end|>'
        "<|start|>assistant"
    )


def test_analysis_is_dropped_once_there_is_an_answer() -> None:
    found = render(
        Turn("user", "Hi"),
        Turn("assistant", "", "Why?", (ToolCall("1", "weather", "{}"),)),
        Turn("tool", "x", call_id="1"),
        Turn("assistant", "Hello", "Hm."),
        Turn("user", "Again"),
    )
    assert "analysis<|message|>" not in found and "Why?" not in found and "Hm." not in found
    assert "<|start|>assistant<|channel|>final<|message|>Hello<|end|>" in found


def test_last_turn_can_be_continued() -> None:
    turns = Turn("user", "Hi"), Turn("assistant", "Hel")
    assert render(*turns, resume=True).endswith("<|channel|>final<|message|>Hel")
    assert parsed(["lo", "!<|return|>"]).text == "lo!"


# A template with gpt-oss's habits: one call in a turn, and text or reasoning in it.
TEMPLATE = """\
{%- set last = namespace(name=none) %}{{ reasoning_effort }}
{%- for t in tools or [] %}{{ t.function.name }}{% endfor %}
{%- for m in messages %}{% if 'tool_calls' in m %}{% set c = m.tool_calls[0].function %}
{%- if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}
{{- '(' + (m.content or m.thinking or '') + ')' + c.name + '=' + c.arguments|tojson }}
{%- set last.name = c.name %}
{%- elif m.role == 'tool' %}{{ '<' + last.name + ' ' + m.content|tojson + '>' }}
{%- else %}{{ m.role + ':' + m.content + ';' }}{% endif %}{% endfor %}"""


def test_template_gets_one_call_a_turn_and_text_or_reasoning() -> None:
    habits = probe(compile_template(TEMPLATE), variables(TEMPLATE))
    assert habits == Habits(True, "object", efforts=habits.efforts, single=True, apart=True)
    calls = (ToolCall("1", "weather", '{"city": "Rome"}'), ToolCall("2", "add", "{}"))
    turns = (
        Turn("user", "Hi"),
        Turn("assistant", "Wait.", "Hm.", calls),
        Turn("tool", "7", call_id="2"),
        Turn("tool", "sun", call_id="1"),
    )
    tokenizer = Tokenizer(byte_tokenizer(["<s>"], ()).backend, {}, chat_template=TEMPLATE)
    talk = Conversation(turns, effort="low").with_results_in_call_order()
    prompt = tokenizer.render_chat(**arguments(talk, TEMPLATE, HARMONY.efforts))
    assert prompt == 'lowuser:Hi;(Hm.\n\nWait.)weather={"city": "Rome"}<weather "sun">()add={}<add "7">'


def test_other_templates_keep_their_turns() -> None:
    """Over random conversations, the own template's prompts have all calls and results."""
    tokenizer = Tokenizer(byte_tokenizer(["<s>"], ()).backend, {}, chat_template=TEMPLATE)
    for talk in talks(5, 60):
        ordered = talk.with_results_in_call_order()
        prompt = tokenizer.render_chat(**arguments(ordered, TEMPLATE, HARMONY.efforts))
        calls = [call for turn in talk.turns for call in turn.calls]
        assert prompt.count("<") >= sum(turn.role == "tool" for turn in talk.turns)
        assert all(f"{call.name}=" in prompt for call in calls)
        single = ordered.with_single_calls()
        assert [c for t in single.turns for c in t.calls] == [c for t in ordered.turns for c in t.calls]
        assert all(len(turn.calls) < 2 for turn in single.turns)


@given(st.lists(st.integers(1, 5), max_size=3), st.randoms(use_true_random=False), st.booleans())
def test_a_result_follows_its_own_call(sizes: list[int], random: Random, complete: bool) -> None:
    """In whatever order the results arrive; calls without one stay behind the turn's other calls."""
    turns: list[Turn] = []
    for at, size in enumerate(sizes):
        calls = tuple(ToolCall(f"{at}.{n}", "f", "{}") for n in range(size))
        answered = list(calls) if complete else random.sample(calls, random.randint(0, size))
        random.shuffle(answered)
        turns += [Turn("assistant", calls=calls), *(Turn("tool", call_id=call.id) for call in answered)]
        turns.append(Turn("user", f"{at}"))
    single = Conversation(tuple(turns)).with_single_calls().turns
    assert sorted(call.id for turn in single for call in turn.calls) == sorted(
        call.id for turn in turns for call in turn.calls
    )
    assert [t for t in single if not t.calls] == [t for t in turns if not t.calls]
    first = {f"{at}.0" for at in range(len(sizes))}  # it stays where its turn is
    for before, turn in pairwise(single):
        if turn.role == "tool" and turn.call_id not in first:
            assert [call.id for call in before.calls] == [turn.call_id]
    open_calls = [t.calls[0].id for t in single if t.calls and t.calls[0].id not in first]
    unanswered = [i for i in open_calls if all(turn.call_id != i for turn in turns)]
    assert unanswered == sorted(unanswered)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_chosen_for_gpt_oss(template: str | None) -> None:
    """Its efforts are the three that the models know, whatever a template accepts."""
    habits = Habits(True, "object", efforts=("none", "low", "max"))
    chosen = choose(Checkpoint("gpt_oss", template, lambda token: token in MARKS, habits))
    for form in (chosen.plain, chosen.tools):
        assert form.efforts == ("low", "medium", "high") and form.tags is None and form.reasons and form.whole
    assert chosen.template == template


# Answers.


def parsed(pieces: list[str], tokens: frozenset[str] = frozenset(), tools: tuple[Tool, ...] = ()) -> Answer:
    parser = OutputParser(HARMONY.calls(tools, tokens), None, False, tokens)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return collect(deltas + parser.finish())


def cuts(text: str) -> Iterator[list[str]]:
    yield [text]
    yield list(text)
    yield from ([text[:at], text[at:]] for at in range(1, len(text)))


ANALYSIS = "<|channel|>analysis<|message|>Hm, 日本?<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>The answer.<|return|>"
HEADS = [
    "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.weather json<|message|>",
    " to=functions.weather<|channel|>commentary json<|message|>",
    " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>",
    "<|channel|>analysis to=functions.weather code<|message|>",
]


def called(answer: Answer) -> list[tuple[str, Any]]:
    return [(name, json.loads(text)) for _, name, text in answer.calls]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reasons", [False, True])
def test_answers_cut_anywhere(head: str, reasons: bool) -> None:
    arguments = {"city": 'Ro{me" <|end|>', "days": [1, {"a": None}]}
    before = f"{ANALYSIS}<|start|>assistant" if reasons else ""
    text = f"{before}{head}{json.dumps(arguments)}"
    for end in ("", "<|call|>"):
        for pieces in cuts(text + end):
            found = parsed(pieces)
            assert called(found) == [("weather", arguments)] and found.text == ""
            assert found.reasoning == ("Hm, 日本?" if reasons else "")


def test_reasoning_preamble_and_answer() -> None:
    preamble = "<|start|>assistant<|channel|>commentary<|message|>I look it up.<|end|>"
    again = "<|start|>assistant<|channel|>analysis<|message|>So.<|end|>"
    for pieces in cuts(ANALYSIS + preamble + again + FINAL):
        found = parsed(pieces)
        assert found == Answer("I look it up.\n\nThe answer.", "Hm, 日本?\n\nSo.", ())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Hello", Answer("Hello", "", ())),  # no channel at all
        (" to me", Answer(" to me", "", ())),
        ("<|channel|>final<|message|>A<|message|>B", Answer("AB", "", ())),
        ("<|channel|>analysis<|message|>A<|channel|>final<|message|>B", Answer("B", "A", ())),  # no end
        ("<|channel|>analysis<|message|>A<|end|>B", Answer("B", "A", ())),  # no head
        ("<|channel|>commentary to=python code<|message|>1 + 1", Answer("", "1 + 1", ())),  # no function
        ("<|channel|>analysis<|message|>A<|end|><|start|>assi", Answer("", "A", ())),
        ("<|channel|>ana", Answer("", "", ())),
        ("x" * 20 + "<|chan", Answer("x" * 20, "", ())),
    ],
)
def test_deviations(text: str, answer: Answer) -> None:
    for pieces in cuts(text):
        assert parsed(pieces) == answer


@pytest.mark.parametrize("mark", ["", "<|constrain|>", "<|message|>Sure."])
def test_head_without_end_becomes_text_at_the_same_place(mark: str) -> None:
    text = "<|channel|>" + "x" * 600 + mark
    whole = parsed([text])
    assert whole.text.startswith("x")
    assert all(parsed(pieces) == whole for pieces in cuts(text))


def test_call_without_arguments() -> None:
    head = HEADS[0]
    assert called(parsed([head + "<|call|>"])) == [("weather", {})]
    assert called(parsed([head])) == [("weather", {})]


def test_spelled_marks_are_text() -> None:
    """Only special tokens are marks; the same characters in a text are not."""
    marked = {mark: MARK + mark for mark in MARKS}
    text = f"{marked['<|channel|>']}final{marked['<|message|>']}Write <|channel|>final<|message|> or <|end|>."
    for pieces in cuts(text + marked["<|return|>"]):
        assert parsed(pieces, MARKS) == Answer("Write <|channel|>final<|message|> or <|end|>.", "", ())


PIECES = [
    *MARKS,
    *HEADS,
    ANALYSIS,
    FINAL,
    " to=",
    " to=functions.f",
    "final",
    "{",
    '"',
    "}",
    "é",
    "x" * 300,
    "\n",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=10).map("".join), st.data())
def test_any_output_is_read_the_same_however_it_is_cut(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    whole = parsed([text])

    def known(found: Answer) -> Answer:
        return replace(found, calls=tuple(("", name, args) for _, name, args in found.calls))

    assert known(parsed([text[:at], text[at:]])) == known(parsed(list(text))) == known(whole)
