"""Required calls are forced in the model's own format, so that its history shows no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from farthing.conversation.base import CallFormat, ChatFormat
from farthing.conversation.formats.glm import GLM45
from farthing.conversation.select import Checkpoint, choose
from farthing.conversation.strict import CallGrammar, forced_grammar
from farthing.conversation.types import Conversation, Tool, ToolChoice
from tests.conversation.published import SHAPES
from tests.conversation.test_parse import Calls, read
from tests.conversation.test_strict import GOOD, OTHER, TOKENIZERS, WEATHER, by_format, by_vocabulary, obey

LOOSE = Tool("get_weather", None, WEATHER.parameters)
LIGHT = Tool("light", None, {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]})
REQUIRED = ToolChoice("required")


def grammar_of(
    form: ChatFormat | CallFormat, tools: tuple[Tool, ...], kind: str, room: int | None = None, **options: Any
) -> CallGrammar | None:
    tokenizer = TOKENIZERS[kind]

    def special(text: str) -> int | None:
        token: int | None = tokenizer.backend.token_to_id(text)
        return token if token in tokenizer.control_ids else None

    options = {"choice": REQUIRED} | options
    return forced_grammar(Conversation((), tools, **options), form.syntax, special, room)


@by_vocabulary
@by_format
def test_the_models_own_calls_are_not_changed(
    form: ChatFormat | CallFormat, write: Callable[[Calls], str], vocabulary: str
) -> None:
    wishes: Calls = [("get_weather", GOOD), ("light", {"on": True}), ("get_weather", GOOD)]
    grammar = grammar_of(form, (LOOSE, LIGHT), vocabulary)
    assert grammar is not None and grammar.openers == ()
    for wish in (wishes, wishes[1:2]):
        assert obey(grammar, vocabulary, write(wish), "</s>").removesuffix("</s>") == write(wish)


@by_format
@pytest.mark.parametrize("seed", range(3))
def test_any_output_is_a_section_of_valid_calls(
    form: ChatFormat | CallFormat, write: Callable[[Calls], str], seed: int
) -> None:
    tools = (LIGHT, OTHER, Tool("now"))
    schemas = {"light": LIGHT.parameters, "now": {}, "other-2": OTHER.parameters}
    grammar = grammar_of(form, tools, "special")
    assert grammar is not None
    said = obey(grammar, "special", "no call", '"}</s>', seed=seed).removesuffix("</s>")
    text, calls = read(form.calls(tools), [said])
    assert text == "" and 1 <= len(calls) <= 8
    for name, arguments in calls:
        jsonschema.validate(arguments, schemas[name] or {})


@by_format
def test_one_call_where_one_is_wanted(form: ChatFormat | CallFormat, write: Callable[[Calls], str]) -> None:
    both: Calls = [("light", {"on": False}), ("light", {"on": True})]
    named = {"choice": ToolChoice("required", ("light",), single=True)}
    for options in ({"parallel_calls": False}, named):
        grammar = grammar_of(form, (LIGHT, OTHER), "special", **options)
        assert grammar is not None
        said = obey(grammar, "special", write(both), "</s>").removesuffix("</s>")
        assert read(form.calls((LIGHT,)), [said]) == ("", both[:1])


@by_format
def test_a_short_answer_has_few_calls(form: ChatFormat | CallFormat, write: Callable[[Calls], str]) -> None:
    """A model that repeats itself would spend all of it on calls."""
    many: Calls = [("light", {"on": False})] * 9
    for room, most in ((1, 1), (256, 2), (10_000, 8)):
        grammar = grammar_of(form, (LIGHT,), "special", room=room)
        assert grammar is not None
        said = obey(grammar, "special", write(many), "</s>").removesuffix("</s>")
        assert read(form.calls((LIGHT,)), [said]) == ("", many[:most])


def test_calls_without_a_grammar_in_the_format_are_json() -> None:
    listed = {"type": "object", "properties": {"x": {"type": "string", "format": "date"}}, "required": ["x"]}
    assert grammar_of(GLM45, (Tool("f", None, listed),), "special") is None
    unknown = choose(Checkpoint("mixtral", "{{ tools }}{{ messages }}", lambda _: False)).tools
    assert grammar_of(unknown, (LIGHT,), "spelled") is None
    for name, own in (("llama3_1", False), ("qwen3", True), ("mistral_small", True), ("granite", True)):
        form = choose(Checkpoint("", SHAPES[name].source, lambda _: False)).tools
        assert (grammar_of(form, (LIGHT,), "spelled") is not None) is own
    assert grammar_of(GLM45, (LIGHT,), "special", choice=ToolChoice()) is None
