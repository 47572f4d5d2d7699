"""What templates expect of earlier calls, and the environment that transformers gives them."""

from __future__ import annotations

import json
import re
import time
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from farthing.conversation.base import EFFORTS
from farthing.conversation.jinja import check_template, compile_template, variables
from farthing.conversation.select import Checkpoint, Habits, choose, probe
from farthing.engine.tokenizer import Tokenizer
from tests.conversation.published import SHAPES

TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} CALL]{% endfor %}\n{% endfor %}"
)
ITEMS = (
    "{% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v if v is string else v | tojson }};{% endfor %}"
)
TEXT = "{{ '<' + c.function.arguments + '>' }}"
EITHER = "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
CALL: dict[str, Any] = {"id": "call_0a1b2c3d", "type": "function"}
ARGUMENTS = {"city": "Zürich", "days": [1, {"from": None}]}


def template(call: str, before: str = "") -> str:
    """A template that writes calls in this way."""
    return before + TURNS.replace("CALL", call)


@cache
def tokenizer(source: str) -> Tokenizer:
    return Tokenizer(HfTokenizer(models.WordLevel({"x": 0}, unk_token="x")), chat_template=source)


def loop(arguments: Any, content: str | None = None) -> list[dict[str, Any]]:
    """A tool loop with one call."""
    call = CALL | {"function": {"name": "look", "arguments": arguments}}
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "Here.", "tool_call_id": call["id"]},
    ]


NULL = (
    "{% for m in messages %}{% if m.tool_calls and m.content is not none %}"
    "{{ raise_exception('no') }}{% endif %}{% endfor %}"
)
PIPED = "{% for k, v in c.function.arguments | items %}{{ v }}{% endfor %}"
MAPPING = "{% if c.function.arguments is mapping %}{{ c.function.arguments | tojson }}{% endif %}"
QUOTED = "{{ c.function.arguments | tojson }}"  # would quote text twice
LENGTH = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('nine letters') }}{% endif %}{{ c.id }}{% endfor %}"
    "{% if m.tool_call_id %}{{ m.tool_call_id }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "habits"),
    [
        (template(ITEMS), Habits(True, "object")),
        (template(PIPED), Habits(True, "object")),
        (template(QUOTED), Habits(True, "object")),
        (template("{{ c.function | tojson }}"), Habits(True, "object")),
        (template(TEXT), Habits(True, "text")),
        (template(EITHER), Habits(True, "text")),  # as the model wrote it
        (template("{{ c.function.arguments }}"), Habits(True, "text")),  # an object in Python's notation
        (template(MAPPING), Habits(True, "object")),
        (template(ITEMS, NULL), Habits(True, "object", "null")),
        (template(TEXT, LENGTH), Habits(True, "text", "text", short_ids=True)),
        (TURNS.replace("CALL", ""), Habits()),
        ("{{ raise_exception('never') }}", Habits()),
        ("{{ messages[0].content }}{{ reasoning_effort }}", Habits(efforts=EFFORTS, leading=True)),
        (
            "{% if reasoning_effort not in ['low', 'high'] %}{{ raise_exception('level') }}{% endif %}",
            Habits(efforts=("low", "high")),
        ),
    ],
)  # fmt: skip
def test_probe(source: str, habits: Habits) -> None:
    assert probe(compile_template(source), variables(source)) == habits
    assert tokenizer(source).habits() == habits


@pytest.mark.parametrize("call", [ITEMS, TEXT, EITHER, QUOTED])
@pytest.mark.parametrize("before", ["", NULL, LENGTH])
def test_a_tool_loop_renders_from_either_form(call: str, before: str) -> None:
    known = tokenizer(template(call, before))
    prompts = {
        known.render_chat(loop(given)) for given in (ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False))
    }
    (prompt,) = prompts
    assert "Zürich" in prompt and "look" in prompt and '\\"' not in prompt


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("call", [ITEMS, TEXT, EITHER])
def test_no_arguments_of_an_earlier_call_are_refused(call: str, arguments: str) -> None:
    assert "Here." in tokenizer(template(call)).render_chat(loop(arguments))


def test_text_that_is_no_json_is_printed() -> None:
    assert "[look arguments=broken;]" in tokenizer(template(ITEMS)).render_chat(loop("broken"))
    assert "city=Zür;" in tokenizer(template(ITEMS)).render_chat(loop('{"city": "Zür'))


def test_short_ids_are_letters_and_digits_and_the_same_for_the_result() -> None:
    prompt = tokenizer(template(TEXT, LENGTH)).render_chat(loop("{}"))
    first, second = prompt[:9], prompt[9:18]
    assert first == second and re.fullmatch("[0-9a-f]{9}", first)
    known = loop("{}")
    known[1]["tool_calls"][0]["id"] = known[2]["tool_call_id"] = "Abcdefg12"
    assert tokenizer(template(TEXT, LENGTH)).render_chat(known).startswith("Abcdefg12Abcdefg12")


LATE = [
    {"role": "system", "content": "Speak."},
    {"role": "user", "content": "Hello."},
    {"role": "system", "content": "It is late."},
]


@pytest.mark.parametrize("name", ["gemma4", "mistral_7b", "mistral_small", "smollm3"])
def test_a_later_system_turn_joins_the_turn_before_it(name: str) -> None:
    """Claude Code sends them; these templates refuse them, or leave them out."""
    known = tokenizer(SHAPES[name].source)
    assert known.habits().leading
    said = known.render_chat(
        [*LATE, {"role": "assistant", "content": "Ho."}, {"role": "user", "content": "So?"}]
    )
    joined = {"role": "user", "content": "Hello.\n\nIt is late."}
    rest = [{"role": "assistant", "content": "Ho."}, {"role": "user", "content": "So?"}]
    assert said == known.render_chat([LATE[0], joined, *rest]) and "It is late." in said
    assert known.render_chat([*LATE, {"role": "user", "content": "So?"}]) == known.render_chat(
        [LATE[0], {"role": "user", "content": "Hello.\n\nIt is late.\n\nSo?"}]
    )


def test_a_system_turn_after_an_answer_begins_the_next_users_turn() -> None:
    hello, answer = {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Ho."}
    late, end = {"role": "system", "content": "It is late."}, {"role": "user", "content": "So?"}
    known = tokenizer(SHAPES["mistral_7b"].source)
    for turns, text in (([late], "It is late."), ([late, late, end], "It is late.\n\nIt is late.\n\nSo?")):
        expected = known.render_chat([hello, answer, {"role": "user", "content": text}])
        assert known.render_chat([hello, answer, *turns]) == expected


def test_a_system_turn_after_a_result_joins_the_result() -> None:
    known = tokenizer(SHAPES["mistral_7b"].source)
    turns = loop({"city": "Rome"})
    joined = [*turns[:2], turns[2] | {"content": "Here.\n\nIt is late."}]
    assert known.render_chat([*turns, LATE[2]]) == known.render_chat(joined)


def test_a_system_turn_that_a_result_would_drop_joins_the_last_users_turn() -> None:
    known = tokenizer(SHAPES["mistral_7b"].source)
    assert known.habits().drops and not tokenizer(SHAPES["mistral_small"].source).habits().drops
    turns = [LATE[0], LATE[1], {"role": "assistant", "content": "Ho."}, *loop({"city": "Rome"})]
    asked = known.render_chat(turns[:4])  # the template prints the system turn in this place itself
    assert known.render_chat(turns).startswith(asked) and "Speak.\n\nWhere?" in asked


@pytest.mark.parametrize("name", ["qwen3", "glm47", "minimax_m2", "llama3_1"])
def test_a_later_system_turn_stays_where_the_template_prints_it(name: str) -> None:
    known = tokenizer(SHAPES[name].source)
    assert not known.habits().leading
    assert "Hello.\n\nIt is late." not in known.render_chat(LATE)


# The environment.

VALUE = {"b": "é<&>'\u2028", "a": [1, 2.5, None, {"deep": True}]}
SOURCES = [
    "{{ v | tojson }}",
    "{{ v | tojson(indent=2) }}",
    "{{ v | tojson(true) }}",
    "{{ v | tojson(false, 4) }}",
    "{{ v | tojson(separators=(',', ':')) }}",
    "{{ v | tojson(separators=(', ', ': '), sort_keys=true, ensure_ascii=true) }}",
    "a {% generation %}{{ v.b }}{% set x = 1 %}{% endgeneration %}\n b{{ x }}",
    "{% for i in v.a %}{% generation %}\n  {{- i }}{{ loop.index }}\n{% endgeneration %}{% endfor %}",
    "{% for i in v.a %}{% if i is none %}{% break %}{% elif i == 1 %}{% continue %}{% endif %}"
    "{{ i }}{% endfor %}",
    "{{ strftime_now('%Y')[:2] }}",
    "  {% if v %}\n  x\n  {% endif %}\n{# note #}\ny",
    "{{ documents }}{{ tools }}{{ undefined }}{{ bos_token }}|{{ pad_token }}",
    "{% set ns = namespace(n=0) %}{% for i in v.a %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1, b=v.b) }}",
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_environment_is_that_of_transformers(source: str) -> None:
    backend = HfTokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    turns = [{"role": "user", "content": "U"}]
    expected = theirs.apply_chat_template(turns, chat_template=source, tokenize=False, v=VALUE)
    ours = Tokenizer(backend, {"bos_token": "<s>"}, chat_template=source)
    assert ours.render_chat(turns, add_generation_prompt=False, v=VALUE) == expected


def test_refusals_and_marks_of_training() -> None:
    with pytest.raises(ValueError, match="only users"):
        compile_template("{{ raise_exception('only users') }}")()
    assert variables("{% generation %}{{ tools }}{{ strftime_now('') }}{% endgeneration %}") == {"tools"}
    with pytest.raises(ValueError, match="does not compile"):
        compile_template("{% generation %}")


@pytest.mark.parametrize(
    ("model_type", "template", "tokens", "expected"),
    [
        ("deepseek_v3", None, "", ("completion", "tools")),
        ("gemma3_text", None, "", ("completion",)),
        ("llama", "{{ messages }}", "", ("completion",)),  # prints no tools, and knows no markup of calls
        ("llama", "{{ messages }}", "<｜tool▁calls▁begin｜>", ("completion", "tools")),
        ("llama", "{{ messages }}{{ tools }}", "", ("completion", "tools")),
        ("qwen3_moe", "{{ tools }}{{ enable_thinking }}<think>", "", ("completion", "tools", "thinking")),
        ("gpt_oss", None, "", ("completion", "tools", "thinking")),
    ],
)
def test_capabilities(model_type: str, template: str | None, tokens: str, expected: tuple[str, ...]) -> None:
    checkpoint = Checkpoint(model_type, template, lambda token: token == tokens)
    assert choose(checkpoint).capabilities == expected


@pytest.mark.parametrize("template", ["{{ tools }}", "{{ tools }}<｜tool▁call▁begin｜>"])
@pytest.mark.parametrize("token", ["", "<｜tool▁call▁begin｜>"])
def test_calls_of_an_unknown_model_are_known_by_its_template_or_its_tokens(template: str, token: str) -> None:
    syntax = choose(Checkpoint("llama", template, lambda each: each == token)).plain.syntax
    assert (syntax is not None) == ("<｜tool▁call▁begin｜>" in template + token)


HUGE = ("'x' * 10**11", "'x' | center(10**11)", "[0] * 10**11", "10 ** 10 ** 10", "('%999999999999d' % 1)")


@pytest.mark.parametrize("work", HUGE)
@pytest.mark.parametrize(
    "place",
    [
        "{{ WORK }}",
        "{% set c = WORK %}",
        "{% for d in WORK %}{% endfor %}",
        "{% if WORK %}{% endif %}",
        "{% filter replace('a', WORK) %}a{% endfilter %}",
        "{% macro m(d=WORK) %}{{ m(d) }}{% endmacro %}",
        "{{ [WORK, {'d': WORK}][0] ~ (WORK if WORK else WORK) }}",
    ],
)
def test_variables_are_found_without_computing_constants(place: str, work: str) -> None:
    """Jinja computes them when it compiles, which the server's own process never does."""
    began = time.thread_time()
    source = "{{ a }}" + place.replace("WORK", work) + "{{ b }}"
    assert variables(source) == {"a", "b"}
    check_template(source)
    assert time.thread_time() - began < 1


@pytest.mark.parametrize(
    "source",
    ["{{ a | nothing }}", "{% if %}", "{{ 'a' }", "{% for a in b %}", "{{ " + "(" * 9999, "{% none %}"],
)
def test_check_of_a_template_refuses_what_does_not_compile(source: str) -> None:
    with pytest.raises(ValueError, match="chat_template does not compile: ") as compiled:
        compile_template(source)
    with pytest.raises(ValueError) as checked:
        check_template(source)
    assert str(checked.value) == str(compiled.value)
