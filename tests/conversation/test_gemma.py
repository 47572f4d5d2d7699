"""Gemma 3's turns are those of its published template; answers of Gemma 4 are parsed wherever cut, and calls
are held to their schemas."""

from __future__ import annotations

import itertools
import re
from random import Random
from typing import Any

import jsonschema
import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from farthing.conversation.base import ControlTokens, FormatError
from farthing.conversation.formats.gemma import GEMMA3, GEMMA4, MARKS
from farthing.conversation.output import OutputParser
from farthing.conversation.select import Checkpoint, choose
from farthing.conversation.types import Tool
from tests.conversation.published import SHAPES
from tests.conversation.talks import messages, talks
from tests.conversation.test_parse import answer, read
from tests.conversation.test_strict import grammar_of, obey

TOKENS = ControlTokens("<bos>", "<eos>")
THEIRS = PreTrainedTokenizerFast(
    tokenizer_object=HfTokenizer(models.WordLevel({"x": 0}, unk_token="x")), bos_token="<bos>"
)
TOOLS = (Tool("look_up", None, {"properties": {"city": {"type": "string"}}}),)


def test_prompts_are_those_of_the_published_template() -> None:
    random, refused = Random(1), 0
    for talk in talks(7, 400, tools=False):
        try:
            expected = THEIRS.apply_chat_template(
                messages(talk, "text", random),
                chat_template=SHAPES["gemma3"].source,
                tokenize=False,
                add_generation_prompt=talk.generate,
            )
        except TemplateError:
            refused += 1
            with pytest.raises(FormatError, match="alternate"):
                GEMMA3.render(talk, TOKENS)
            continue
        assert GEMMA3.render(talk, TOKENS) == expected
    assert refused < 200


ROME = '<|"|>Ro"m\\e{,<|"|>'
TEXTS = {  # an answer -> reasoning, text, calls
    "Hello.": ("", "Hello.", []),
    "<|channel>thought\nWhy?\nSo.\n<channel|>Rome.": ("Why?\nSo.", "Rome.", []),
    "<|channel>thought\n<channel|>Rome.": ("", "Rome.", []),
    f"<|channel>thought\nHm.\n<channel|><|tool_call>call:look_up{{city:{ROME},n:-2.5}}<tool_call|>": (
        "Hm.", "", [("look_up", '{"city": "Ro\\"m\\\\e{,","n": -2.5}')],
    ),
    "<|tool_call>call:look_up{}<tool_call|><|tool_call>call:a{x:[],b:{c:None}}<tool_call|><|tool_response>": (
        "", "", [("look_up", "{}"), ("a", '{"x": [],"b": {"c": null}}')],
    ),
    "<|tool_call>call:look_up<tool_call|>": ("", "", [("look_up", "{}")]),
    "<|tool_call>call:look_up{city:Rome}<tool_call|>": ("", "", [("look_up", '{"city": "Rome"}')]),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_answers_cut_anywhere(text: str) -> None:
    cuts = [[text], list(text), *([text[:at], text[at:]] for at in range(len(text)))]
    for chunks in cuts:
        found = answer(OutputParser(GEMMA4.calls(TOOLS, frozenset()), None, False), chunks)
        calls = [(name, arguments) for _, name, arguments in found.calls]
        assert (found.reasoning, found.text, calls) == TEXTS[text]


def test_templates_choose_it() -> None:
    """Gemma 4's answers are read whole, with the reasoning; Gemma 3 has neither calls nor thoughts."""
    chosen = choose(Checkpoint("gemma4", SHAPES["gemma4"].source, lambda token: token in MARKS))
    assert chosen.plain.whole and chosen.plain.reasons and chosen.plain.tags is None
    assert chosen.plain.markup == MARKS and chosen.plain.efforts == ("none",)
    for template in (SHAPES["gemma3"].source, None):
        plain = choose(Checkpoint("gemma3_text", template, lambda token: False)).plain
        assert not plain.reasons and "<end_of_turn>" in plain.stops and not plain.markup
    assert all(a == b or not a.startswith(b) for a, b in itertools.product(MARKS, MARKS))


NESTED: dict[str, Any] = {
    "tree": {
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "Name": {"type": "string"},
                    "alive": {"type": ["boolean", "null"]},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["Name"],
            }
        },
    },
    "free": {
        "properties": {"any": {}, "map": {"type": "object", "additionalProperties": {"type": "number"}}}
    },
    "listed": {
        "properties": {
            "one": {"enum": ["a", 2, None, {"b": [True]}]},
            "two": {"allOf": [{"const": "x"}]},
            "three": {"oneOf": [{"type": "integer", "minimum": 3, "maximum": 5}, {"type": "string"}]},
            "four": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["four", "one"],
    },
    "none": {"properties": {}},
    "undeclared": {"properties": {"x": {"type": "integer"}}, "required": ["q"]},
}


@pytest.mark.parametrize("kind", ["special", "spelled"])
@pytest.mark.parametrize("name", NESTED)
def test_grammars_of_nested_schemas(name: str, kind: str) -> None:
    """Whatever is drawn, the call that is read fits the schema."""
    tool = Tool("look_up", None, {"type": "object", **NESTED[name]}, strict=True)
    grammar = grammar_of(GEMMA4, (tool,), kind)
    assert grammar is not None and grammar.openers == ("<|tool_call>",)
    for seed in range(8):
        said = obey(grammar, kind, "call:look_up{", '<|"|>]}', seed)
        ((called, arguments),) = read(GEMMA4.calls((tool,)), ["<|tool_call>" + said])[1]
        assert called == "look_up"
        jsonschema.validate(arguments, dict(tool.parameters or {}))


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"allOf": [{}, {}]}, "allOf"),
        ({"type": "string", "format": "date"}, "format"),
        ({"type": "tuple"}, "type 'tuple'"),
        ({"$ref": "#/$defs/lost"}, "what no value fits"),
        ({"type": "object", "properties": {"a:b": {}}}, "the name 'a:b'"),
        ({"type": "object", "properties": 3}, "damaged schema"),
        ({"type": "object", "required": [{}]}, "damaged schema"),
        ({"enum": ['<|"|>']}, "a text with"),
    ],
)
def test_schemas_that_the_notation_cannot_hold(schema: dict[str, Any], what: str) -> None:
    tool = Tool("look_up", None, {"type": "object", "properties": {"x": schema}}, strict=True)
    with pytest.raises(ValueError, match=re.escape(what)) as caught:
        grammar_of(GEMMA4, (tool,), "special")
    assert "'look_up'" in str(caught.value) and "expected" in str(caught.value)
