"""Grammars take time in proportion to their tools' schemas, and prompts of many calls to their number."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from farthing.conversation.arguments import ObjectText, as_object, kinds_of, object_of
from farthing.conversation.forced import schema as forced_schema
from farthing.conversation.select import CALLS
from farthing.conversation.strict import MAX_CHARACTERS, call_grammar, forced_grammar
from farthing.conversation.types import Conversation, Tool, ToolCall, ToolChoice, Turn
from tests.growth import chained, excess

SYNTAXES = {name: form.syntax for name, form in CALLS.items() if form.syntax is not None}
TEXT = {"type": "string"}


def objects(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), **more}


def shared(size: int, definition: Any) -> dict[str, Any]:
    """Parameters that all refer to one definition, none of them in the same words."""
    parameters = {f"p{at}": {"$ref": "#/$defs/a", "description": f"{at}"} for at in range(size)}
    return objects(parameters, **{"$defs": {"a": definition}})


def layered(size: int) -> dict[str, Any]:
    """Unions of references to a union of references, and so on: few words for very many branches."""
    layers = {f"l{at}": {"anyOf": [{"$ref": f"#/$defs/l{at + 1}"}] * size} for at in range(4)}
    return objects({"p": {"$ref": "#/$defs/l0"}}, **{"$defs": layers | {"l4": {"type": "string"}}})


SHAPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "parameters": lambda size: objects({f"p{at}": TEXT for at in range(size)}),
    "optional parameters": lambda size: {
        "type": "object",
        "properties": {f"p{at}": TEXT for at in range(size)},
    },
    "required names": lambda size: {"type": "object", "properties": {"a": TEXT}, "required": ["a"] * size},
    "chained references": chained,
    "references to the whole": lambda size: objects({f"p{at}": {"$ref": "#"} for at in range(size)}),
    "references to a union": lambda size: shared(size, {"anyOf": [TEXT, {"const": 1}] * size}),
    "references to an enumeration": lambda size: shared(size, {"enum": [f"{at}" for at in range(size)]}),
    "references to an object": lambda size: shared(size, objects({f"q{at}": TEXT for at in range(size)})),
    "references to a far reference": lambda size: shared(size, {"$ref": "#" + "/$defs" * size}),
    "layered unions": lambda size: layered(size // 8),
    "empty unions": lambda size: shared(size, {"anyOf": [{"anyOf": []}] * size}),
    "enumeration": lambda size: objects({"a": {"enum": [f"{at}" for at in range(size)]}}),
    "slashes": lambda size: objects({"a": {"type": "string", "pattern": "\\/" * size}}),
    "long name": lambda size: objects({"a" * size: TEXT}),
}


def conversation(schema: dict[str, Any], mode: Any) -> Conversation:
    return Conversation((Turn("user", "hi"),), (Tool("f", None, schema, True),), ToolChoice(mode))


@pytest.mark.slow  # by the clock; unions without members are near the limit
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", SYNTAXES)
def test_grammars_grow_with_the_schema(form: str, shape: str) -> None:
    def build(size: int) -> None:
        for mode, grammar in (("auto", call_grammar), ("required", forced_grammar)):
            with suppress(ValueError):  # the error of a client
                made = grammar(conversation(schemas[size], mode), SYNTAXES[form], lambda _: None)
                assert made is None or len(made.grammar) < 2 * MAX_CHARACTERS
        forced_schema(conversation(schemas[size], "required"))

    schemas = {size: SHAPES[shape](size) for size in (200, 800)}
    assert excess(build, 200, noticed=0.02) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_types_of_a_parameter_are_found_in_bounded_time(shape: str) -> None:
    schemas = {size: SHAPES[shape](size) for size in (1000, 4000)}
    assert excess(lambda size: kinds_of(schemas[size], "p0"), 1000) is None


def test_references_within_reason_are_followed() -> None:
    schema = shared(50, {"anyOf": [TEXT, {"enum": [*range(50)]}]})
    assert kinds_of(schema, "p7") == {"string", "integer"}
    for syntax in SYNTAXES.values():
        assert call_grammar(conversation(schema, "auto"), syntax, lambda _: None) is not None


ARGUMENTS: dict[str, Callable[[int], str]] = {
    "escapes": lambda size: '{"a": "' + "\\n" * size,
    "quotes": lambda size: '{"a": "' + '\\"' * size,
    "control characters": lambda size: '{"a": "' + "\n" * size,
    "key without end": lambda size: '{"' + "a" * size,
    "escapes in a key": lambda size: '{"' + "\\n" * size,
    "digits": lambda size: '{"a": ' + "1" * size,
    "space": lambda size: '{"a":' + " " * size,
    "members": lambda size: "{" + ", ".join(f'"k{at}": [1, {{}}]' for at in range(size // 8)),
    "brackets": lambda size: '{"a": ' + "[" * size,
    "words": lambda size: '{"a": [' + "true, " * size,
}


@pytest.mark.parametrize("text", ARGUMENTS)
@pytest.mark.parametrize("pieces", [1, 7, None])
def test_arguments_are_read_in_linear_time(text: str, pieces: int | None) -> None:
    """However a model writes them, in pieces or at once."""

    def read(size: int) -> None:
        whole, writer = texts[size], ObjectText()
        for start in range(0, len(whole), pieces or len(whole)):
            writer.push(whole[start : start + (pieces or len(whole))])
        writer.close()
        as_object(whole)
        object_of(whole)

    texts = {size: ARGUMENTS[text](size) for size in (20_000, 80_000)}
    assert excess(read, 20_000, noticed=0.2) is None


@pytest.mark.parametrize("order", ["in order", "backwards", "one id", "unknown ids"])
def test_calls_are_put_next_to_their_results_in_linear_time(order: str) -> None:
    def talk(size: int) -> Conversation:
        ids = ["a" if order == "one id" else f"{at}" for at in range(size)]
        calls = tuple(ToolCall(each, "f", "{}") for each in ids)
        answered = [f"{each}?" for each in ids] if order == "unknown ids" else ids
        results = [Turn("tool", call_id=each) for each in answered]
        return Conversation((Turn("assistant", calls=calls), *results[:: -1 if order == "backwards" else 1]))

    asked = {size: talk(size) for size in (3000, 12000)}
    assert excess(lambda size: asked[size].with_single_calls(), 3000) is None
    assert excess(lambda size: asked[size].with_results_in_call_order(), 3000) is None
