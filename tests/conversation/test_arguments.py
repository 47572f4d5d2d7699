"""Arguments as objects: whatever the model writes, and however it is cut, the result is a JSON object."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.conversation.arguments import Budget, ObjectText, as_object, kinds_of, parsed

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


def pushed(text: str, size: int) -> str:
    writer = ObjectText()
    pieces = [writer.push(text[at : at + size]) for at in range(0, len(text), size)]
    return "".join((*pieces, writer.close()))


@settings(max_examples=40, deadline=None)
@given(OBJECTS, st.integers(1, 5), st.booleans(), st.sampled_from([None, 1]))
def test_an_object_is_passed_on(value: Any, size: int, ascii_: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_, indent=indent)
    assert json.loads(pushed(text, size)) == value


@settings(max_examples=40, deadline=None)
@given(OBJECTS, st.data())
def test_the_beginning_of_an_object_is_one(value: Any, data: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    cut = text[: data.draw(st.integers(1, len(text)))]
    found = json.loads(pushed(cut, 3))
    assert "_raw" not in found or "_raw" in value
    assert set(found) <= set(value)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet='{}[]",:\\ntru1.e- a\n', max_size=24), st.integers(1, 4))
def test_any_text_becomes_an_object_without_loss(text: str, size: int) -> None:
    result = pushed(text, size)
    assert result == pushed(text, max(1, len(text)))
    if not text.strip():
        return
    found = json.loads(result)
    assert isinstance(found, dict)
    strict = parsed(text)
    assert found.get("_raw", text) == text or strict is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("no JSON", {"_raw": "no JSON"}),
        ("[1]", {"_raw": "[1]"}),
        ("{'a': 1}", {"_raw": "{'a': 1}"}),
        ('{"a": 1, b: 2}', {"a": 1, "_raw": '{"a": 1, b: 2}'}),
        ('{"a": [1, {"b": "c" "d"}]}', {"a": [1, {"b": "c"}], "_raw": '{"a": [1, {"b": "c" "d"}]}'}),
        ('{"a": nan}', {"_raw": '{"a": nan}'}),
        ('{"a": 1} and more', {"a": 1, "_raw": '{"a": 1} and more'}),
        ('{"a": "\\d"}', {"a": "", "_raw": '{"a": "\\d"}'}),
        ('{"a": "one\ntwo"}', {"a": "one\ntwo"}),
        ('{"a": 1,}', {"a": 1, "_raw": '{"a": 1,}'}),
        ('{"a": "tex', {"a": "tex"}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": 12', {"a": 12}),
        ('{"a": tru', {}),
        ('{"a": "x\\u12', {"a": "x"}),
        ('{"a": 1, "b": 1e999}', {"a": 1, "_raw": '{"a": 1, "b": 1e999}'}),
        ('{"a": -' + "1" * 5000 + "}", {"_raw": '{"a": -' + "1" * 5000 + "}"}),
        ('{"a": 1e308}', {"a": 1e308}),
    ],
)
def test_examples(text: str, value: Any) -> None:
    for size in (1, 2, len(text) or 1):
        result = pushed(text, size)
        assert (json.loads(result) if result else None) == value
    assert as_object(text) == pushed(text, 1)


@pytest.mark.parametrize("end", ["", "]" * 3000 + "}"])
def test_nesting_that_no_client_could_send_back(end: str) -> None:
    text = '{"ok": 1, "deep": ' + "[" * 3000 + end
    found = json.loads(as_object(text))
    assert (found["ok"], found["_raw"]) == (1, text)
    assert as_object(text) == pushed(text, 7)


@pytest.mark.parametrize(
    ("schema", "kinds"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"$ref": "#/$defs/n"}, {"number"}),
        ({"anyOf": [{"const": 1}, {"enum": ["a", None]}]}, {"integer", "string", "null"}),
        ({"oneOf": [{"type": "string"}, {"description": "anything"}]}, None),
        ({"allOf": [{"description": "a number"}, {"$ref": "#/$defs/n"}]}, {"number"}),
        ({"allOf": [{"$ref": "#/properties/p"}]}, None),
        ({"anyOf": [{"$ref": "#/properties/p"}]}, None),
        ({"$ref": "#/properties/p"}, None),
        ({"enum": list(range(2000))}, None),
    ],
)
def test_types_are_those_that_every_part_of_a_schema_allows(schema: Any, kinds: set[str] | None) -> None:
    parameters = {"properties": {"p": schema}, "$defs": {"n": {"type": "number"}}}
    assert kinds_of(parameters, "p") == kinds


def test_schemas_beyond_their_budget_are_refused_with_it() -> None:
    with pytest.raises(ValueError, match="more than 3 parts"):
        kinds_of({"properties": {"p": {"enum": [1, 2, 3, 4]}}}, "p", Budget(3))
