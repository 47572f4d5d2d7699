"""Tool calls are read from both notations, wherever the stream is cut."""

from __future__ import annotations

import itertools
import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.server.tools import (
    ArgumentsParser,
    CallArguments,
    CallStart,
    Content,
    DeepSeekParser,
    JsonListParser,
    PlainParser,
    ToolParser,
    calls_schema,
)

Calls = list[tuple[str, str]]


def run(parser: ToolParser, chunks: list[str]) -> tuple[str, Calls]:
    """(content, [(name, arguments)])."""
    text, names, arguments = "", [], []
    for event in [event for chunk in chunks for event in parser.push(chunk)] + parser.finish():
        if isinstance(event, Content):
            text += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(names) and event.id.startswith("call_")
            names.append(event.name)
            arguments.append("")
        else:
            assert isinstance(event, CallArguments) and event.index == len(names) - 1
            arguments[event.index] += event.text
    assert parser.calls == len(names)
    return text, list(zip(names, arguments, strict=True))


def v3(calls: Calls) -> str:
    body = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>"


def v31(calls: Calls) -> str:
    body = "".join(f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{a}<｜tool▁call▁end｜>" for n, a in calls)
    return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>"


ARGUMENTS = st.dictionaries(
    st.text(max_size=5),
    st.one_of(st.integers(), st.text(max_size=12), st.sampled_from(["```", "\n", "<｜", "a<b"])),
).map(json.dumps)
CALLS = st.lists(st.tuples(st.sampled_from(["get_weather", "f", "add-2"]), ARGUMENTS), min_size=1, max_size=3)


def chunked(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    CALLS,
    st.sampled_from([v3, v31]),
    st.sampled_from(["", "Let me see."]),
    st.lists(st.integers(0), max_size=9),
)
def test_deepseek_notation_survives_any_chunking(calls: Calls, write, before: str, cuts: list[int]) -> None:  # type: ignore[no-untyped-def]
    text = before + write(calls)
    assert run(DeepSeekParser(), chunked(text, cuts)) == (before, calls)
    assert run(DeepSeekParser(), list(text)) == (before, calls)


@given(CALLS, st.booleans(), st.lists(st.integers(0), max_size=9))
def test_json_list_survives_any_chunking(calls: Calls, spaced: bool, cuts: list[int]) -> None:
    document = [{"name": name, "parameters": json.loads(arguments)} for name, arguments in calls]
    text = json.dumps(document, indent=2 if spaced else None)
    content, found = run(JsonListParser(), chunked(text, cuts))
    assert content == ""
    assert [(n, json.loads(a)) for n, a in found] == [(n, json.loads(a)) for n, a in calls]


@given(st.text("a<｜tool▁calls▁begin｜>\n", max_size=60), st.lists(st.integers(0), max_size=5))
def test_text_without_calls_is_passed_on(text: str, cuts: list[int]) -> None:
    if "<｜tool▁calls▁begin｜>" not in text:
        assert run(DeepSeekParser(), chunked(text, cuts)) == (text, [])
    assert run(PlainParser(), chunked(text, cuts)) == (text, [])


def test_arguments_stream_before_the_call_ends() -> None:
    parser = DeepSeekParser()
    parser.push("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n")
    assert parser.push('{"city": "Par') == [CallArguments(0, '{"city": "Par')]


def test_a_call_cut_off_keeps_what_it_has() -> None:
    text = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1'
    assert run(DeepSeekParser(), [text]) == ("", [("f", '{"a": 1')])


def test_no_arguments_become_an_empty_object() -> None:
    assert run(DeepSeekParser(), [v31([("f", "")])]) == ("", [("f", "{}")])


def test_text_after_calls_is_content() -> None:
    assert run(DeepSeekParser(), [v3([("f", "{}")]) + "done"]) == ("done", [("f", "{}")])


def test_a_named_call_is_all_arguments() -> None:
    assert run(ArgumentsParser("f"), ['{"a"', ": 1}"]) == ("", [("f", '{"a": 1}')])


def test_json_that_is_no_call_becomes_content() -> None:
    assert run(JsonListParser(), ["sorry"]) == ("sorry", [])


SCHEMA = {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}


@pytest.mark.parametrize("parallel", [True, False])
def test_schema_of_calls(parallel: bool) -> None:
    schema = calls_schema([("f", SCHEMA), ("g", {"type": "object"})], parallel)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    one = {"name": "f", "parameters": {"x": 1}}
    assert validator.is_valid([one])
    assert validator.is_valid([one, {"name": "g", "parameters": {}}]) is parallel
    for wrong in (
        [],
        [{"name": "h", "parameters": {}}],
        [{"name": "f", "parameters": {"x": "1"}}],
        [{"name": "f"}],
    ):
        assert not validator.is_valid(wrong)
