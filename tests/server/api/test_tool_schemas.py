"""A tool whose schema no call can match is refused in every API, by the field that is wrong."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.harness import Running, ScriptedEngine, running

USER = [{"role": "user", "content": "hi"}]


def bodies(schema: Any) -> dict[str, tuple[dict[str, Any], str]]:
    """Path -> a body with a tool of this schema, and the name of the schema's field."""
    function = {"name": "f", "parameters": schema}
    return {
        "/v1/chat/completions": (
            {"messages": USER, "tools": [{"type": "function", "function": function}]},
            "tools[0].function.parameters",
        ),
        "/v1/responses": ({"input": "hi", "tools": [{"type": "function"} | function]}, "tools[0].parameters"),
        "/v1/messages": (
            {"messages": USER, "max_tokens": 9, "tools": [{"name": "f", "input_schema": schema}]},
            "tools[0].input_schema",
        ),
        "/v1/messages/count_tokens": (
            {"messages": USER, "tools": [{"name": "f", "input_schema": schema}]},
            "tools[0].input_schema",
        ),
        "/tokenize": (
            {"messages": USER, "tools": [{"type": "function", "function": function}]},
            "tools[0].function.parameters",
        ),
    }


@pytest.fixture(scope="module")
def server() -> Any:
    with running(ScriptedEngine()) as server:
        yield server


def within(schema: Any) -> dict[str, Any]:
    """The schema of a parameter x."""
    return {"type": "object", "properties": {"x": schema}}


@pytest.mark.parametrize(
    ("schema", "field", "got"),
    [
        ({"type": "objekt"}, ".type", "got 'objekt'; expected 'object'"),
        ({"type": "array"}, ".type", "got 'array'; expected 'object'"),
        ({"type": 5}, ".type", "got 5; expected 'object'"),
        ({"type": []}, ".type", "got []; expected 'object'"),
        ({"type": ["object", "nil"]}, ".type", "got ['object', 'nil']; expected one of 'object', 'array'"),
        ({"type": "object", "properties": []}, ".properties", "got []; expected an object of schemas"),
        ({"type": "object", "required": "x"}, ".required", "got 'x'; expected a list of names"),
        (within("string"), ".properties.x", "got 'string'; expected a schema"),
        (within({"type": "str"}), ".properties.x.type", "got 'str'; expected one of"),
        (within({"type": {"a": 1}}), ".properties.x.type", "got {'a': 1}; expected one of"),
        (within({"type": "array", "items": {"type": "STRING"}}), ".properties.x.items.type", "got 'STRING'"),
        (within({"anyOf": [{}, {"type": "any"}]}), ".properties.x.anyOf[1].type", "got 'any'"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "x"}}}, ".$defs.a.type", "got 'x'"),
        ({"additionalProperties": {"type": "float"}}, ".additionalProperties.type", "got 'float'"),
    ],
)
def test_impossible_schemas_are_refused(server: Running, schema: Any, field: str, got: str) -> None:
    for path, (body, prefix) in bodies(schema).items():
        answer = httpx.post(server.url + path, json=body)
        assert answer.status_code == 400, (path, answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(f"{prefix}{field}: {got}"), error
        assert path.startswith("/v1/messages") or error["param"] == prefix + field


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": ["object", "null"]},
        {"properties": {"type": {"type": "string", "enum": ["type"]}, "properties": {"type": "array"}}},
        {"anyOf": [{"type": "object"}, {"$ref": "#/$defs/a"}], "$defs": {"a": True}},
        within({"type": ["string", "null"], "default": {"type": "objekt"}, "examples": [{"type": 1}]}),
        within({"const": {"type": "x"}, "items": [{"type": "string"}, False], "format": None}),
    ],
)
def test_other_schemas_are_accepted(server: Running, schema: Any) -> None:
    for path, (body, _) in bodies(schema).items():
        answer = httpx.post(server.url + path, json=body)
        assert answer.status_code == 200, (path, answer.text)


def test_tools_of_a_namespace_are_checked(server: Running) -> None:
    inner = {"type": "function", "name": "f", "parameters": {"type": "array"}}
    tools = [{"type": "namespace", "name": "n", "tools": [inner]}]
    error = httpx.post(f"{server.url}/v1/responses", json={"input": "hi", "tools": tools}).json()["error"]
    assert error["param"] == "tools[0].tools[0].parameters.type"
