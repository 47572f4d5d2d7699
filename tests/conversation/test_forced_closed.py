"""Schemas of forced arguments allow no undeclared members, unless they say so."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from farthing.conversation.forced import MOST_MEMBERS, closed
from farthing.engine.request import StructuredOutputsParams
from tests.conversation.test_strict import COMPILERS, TOKENIZERS

pytest.importorskip("llguidance")

INTEGER = {"type": "integer"}
TEXT = {"type": "string"}
POINT = {"type": "object", "properties": {"x": INTEGER, "y": INTEGER}, "required": ["x"]}


def allows(schema: dict[str, Any], value: Any) -> bool:
    """Whether a grammar of the closed schema allows a value; the value must satisfy the schema itself."""
    jsonschema.validate(value, schema)
    tokenizer = TOKENIZERS["spelled"]
    matcher = COMPILERS["spelled"].compile(StructuredOutputsParams(json=closed(schema)))
    tokens = tokenizer.encode(json.dumps(value), add_special_tokens=False)
    return matcher.valid_prefix(tokens) == len(tokens)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (POINT, {"x": 1, "y": 2}, {"x": 1, "z": 2}),
        (POINT, {"x": -(10**18)}, {"x": 10**30}),
        (POINT | {"additionalProperties": True}, {"x": 1, "z": [2]}, None),
        ({"type": "object", "properties": {"p": POINT}}, {"p": {"x": 1}}, {"p": {"x": 1, "z": 2}}),
        ({"type": "array", "items": POINT}, [{"x": 1}] * 40, [{"x": 1, "z": 2}]),
        ({"anyOf": [POINT, {"type": "null"}]}, {"x": 1}, {"x": 1, "z": 2}),
        ({"$ref": "#/$defs/p", "$defs": {"p": POINT}}, {"x": 1}, {"x": 1, "z": 2}),
        ({"allOf": [{"$ref": "#/$defs/p"}], "$defs": {"p": POINT}}, {"x": 1}, {"x": 1, "z": 2}),
        ({"type": "object", "properties": {}}, {}, {"z": 1}),
        ({"type": "object"}, {"z": {"deep": [1]}}, {str(i): i for i in range(MOST_MEMBERS + 1)}),
        ({"type": "object", "additionalProperties": TEXT}, {"z": "1"}, {str(i): "" for i in range(20)}),
        ({"type": "object", "minProperties": 18}, {str(i): i for i in range(18)}, None),
        ({}, {"z": 10**30}, None),
        (INTEGER | {"minimum": 5}, 6, 10**30),
        (INTEGER | {"minimum": -(10**18) * 9 - 8}, 5, None),
        (INTEGER | {"enum": [10**18]}, 10**18, None),
        # parts that describe the same value are not closed one by one
        (
            {"allOf": [POINT, {"properties": {"z": INTEGER}, "required": ["z"]}], "type": "object"},
            {"x": 1, "z": 2},
            None,
        ),
        (
            {"allOf": [{"$ref": "#/$defs/p"}, {"properties": {"z": INTEGER}}], "$defs": {"p": POINT}},
            {"x": 1, "z": 2},
            None,
        ),
        (POINT | {"anyOf": [{"required": ["z"]}, {"required": ["y"]}]}, {"x": 1, "y": 2}, None),
    ],
)
def test_only_what_is_declared(schema: dict[str, Any], good: Any, bad: Any) -> None:
    assert allows(schema, good)
    assert bad is None or not allows(schema, bad)


@pytest.mark.parametrize("part", [3, None, [], "x", [{}], True, {"a": 1}])
def test_damaged_schemas_stay_as_they_are(part: Any) -> None:
    """The grammar refuses them with an error of its own."""
    for key in (
        "properties",
        "required",
        "items",
        "anyOf",
        "allOf",
        "$defs",
        "minProperties",
        "type",
        "minimum",
    ):
        schema = {"type": "object", key: part}
        assert closed(schema)[key] == part


def test_response_formats_keep_their_indentation() -> None:
    tokenizer = TOKENIZERS["spelled"]
    value = {"p": {"x": 1, "y": 2}}
    schema = {"type": "object", "properties": {"p": POINT}}
    for indent in (None, 1, 2, 4, "\t"):
        matcher = COMPILERS["spelled"].compile(StructuredOutputsParams(json=schema))
        tokens = tokenizer.encode(json.dumps(value, indent=indent), add_special_tokens=False)
        assert matcher.valid_prefix(tokens) == len(tokens)
    matcher = COMPILERS["spelled"].compile(StructuredOutputsParams(json=schema))
    for blanks in ("  ", "\n\n", "\n" + 9 * " "):
        tokens = tokenizer.encode("{" + blanks, add_special_tokens=False)
        assert matcher.valid_prefix(tokens) == len(tokens) - 1
