"""Errors name fields as the client wrote them: their path, and this API's word for them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.harness import Running, ScriptedEngine, running

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
Fields = dict[str, Any]
USER = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": USER, "max_tokens": 9},
}
RESULT = "messages[0].content[0].content[0]"
SCHEMA = {"type": "object", "properties": {"x": {"type": "objekt"}}}


def said(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


def result(*blocks: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "a", "content": list(blocks)}


@pytest.fixture(scope="module")
def server() -> Any:
    with running(ScriptedEngine()) as server:
        yield server


PATHS = [
    (CHAT, {"messages": said({"type": "image_url"})}, "messages[0].content[0].type", "the vision part of"),
    (CHAT, {"messages": said({"type": "text"})}, "messages[0].content[0].text", "is missing"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    (CHAT, {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "is missing"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "requires a call, but tools is empty"),
    (
        CHAT,
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": 5}},
        "tool_choice.allowed_tools",
        "got 5",
    ),
    (CHAT, {"tool_choice": "robot"}, "tool_choice", "expected 'none', 'auto' or 'required' or an object"),
    (CHAT, {"tool_choice": {"type": "robot"}}, "tool_choice.type", "got 'robot'; expected 'function'"),
    (CHAT, {"function_call": {"name": "f"}}, "function_call", "names 'f', which tools does not define"),
    (CHAT, {"stream_options": {}}, "stream_options", "needs stream = true"),
    (CHAT, {"temperature": 5}, "temperature", "got 5; expected at most 2"),
    (RESPONSES, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "is missing"),
    (RESPONSES, {"tools": [{"type": "robot"}]}, "tools[0].type", "got 'robot'; expected one of 'function', "),
    (RESPONSES, {"tools": [{"name": "f"}]}, "tools[0].type", "is missing; expected one of 'function', "),
    (RESPONSES, {"tools": [5]}, "tools[0]", "got 5; expected an object"),
    (RESPONSES, {"input": said({"type": "input_image"})}, "input[0].content[0].type", "the vision part of"),
    (RESPONSES, {"input": said({"type": "input_text"})}, "input[0].content[0].text", "is missing"),
    (RESPONSES, {"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "is missing"),
    (RESPONSES, {"background": True}, "background", "is not supported"),
    (MESSAGES, {"messages": said({"type": "text", "text": 5})}, "messages[0].content[0].text", "got 5"),
    (MESSAGES, {"messages": said({"type": "image"})}, "messages[0].content[0].type", "the vision part of"),
    (MESSAGES, {"messages": said({"text": "hi"})}, "messages[0].content[0].type", "is missing"),
    (
        MESSAGES,
        {"messages": said(result({"type": "image"}))},
        "messages[0].content[0].content[0].type",
        "text only",
    ),
    (
        MESSAGES,
        {"messages": said(result({"type": "document"}))},
        "messages[0].content[0].content[0].type",
        "text only",
    ),
    (MESSAGES, {"messages": said({"type": "tool_use"})}, "messages[0].content[0].id", "is missing"),
    (MESSAGES, {"tools": [{"name": "f"}]}, "tools[0].input_schema", "is missing"),
    (
        MESSAGES,
        {"tools": [{"name": "x", "type": "web_search_20250305"}]},
        "tools[0].type",
        "got 'web_search_20250305'",
    ),
]


@pytest.mark.parametrize(("path", "fields", "param", "text"), PATHS)
def test_paths_have_no_names_of_types(
    server: Running, path: str, fields: Fields, param: str, text: str
) -> None:
    answer = httpx.post(server.url + path, json=BODIES[path] | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith(param) and text in error["message"], error
    assert path == MESSAGES or error["param"] == param


NAMES = [
    (CHAT, {"max_tokens": 10**8}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 10**8}, "max_completion_tokens"),
    (CHAT, {"guided_json": SCHEMA}, "guided_json"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        "response_format.json_schema.schema",
    ),
    (CHAT, {"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages"),
    (RESPONSES, {"max_output_tokens": 10**8}, "max_output_tokens"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "text.format.schema"),
    (RESPONSES, {"input": "x" * 10**6}, "input"),
    (MESSAGES, {"output_format": {"type": "json_schema", "schema": SCHEMA}}, "output_format.schema"),
]


@pytest.mark.parametrize(("path", "fields", "param"), NAMES)
def test_fields_have_the_names_of_their_api(server: Running, path: str, fields: Fields, param: str) -> None:
    answer = httpx.post(server.url + path, json=BODIES[path] | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param in error["message"], error
    assert path == MESSAGES or error["param"] == param


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("headers", "got"),
    [
        ({}, "is missing"),
        ({"Content-Type": "text/plain"}, "is 'text/plain'"),
    ],
)
def test_another_content_type_is_named(server: Running, path: str, headers: dict[str, str], got: str) -> None:
    answer = httpx.post(server.url + path, content=b'{"model": "tiny"}', headers=headers)
    assert answer.status_code == 400
    wanted = f"the header Content-Type {got}; expected 'application/json'"
    assert answer.json()["error"]["message"] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "the body is not UTF-8: byte 0xff at offset 0"),
        ('{"model": "é"}'.encode("latin-1"), "the body is not UTF-8: byte 0xe9 at offset 11"),
        (b'{"seed": ' + b"1" * 100_000 + b"}", "the body contains a number of more than 640 digits"),
        *(
            ('{"model": "x"}'.encode(encoding), "the body contains zero bytes; expected JSON in UTF-8")
            for encoding in ("utf-16", "utf-16-le", "utf-32-be")
        ),
    ],
)
def test_bodies_that_python_cannot_or_should_not_parse(server: Running, content: bytes, message: str) -> None:
    answer = httpx.post(server.url + CHAT, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"model": "x" * 9_999}),
        (CHAT, {"function_call": {"name": "x" * 9_999}}),
        (CHAT, {"messages": [{"role": "tool", "content": "x", "tool_call_id": "x" * 9_999}]}),
        (RESPONSES, {"previous_response_id": "x" * 9_999}),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x" * 9_999}]}),
    ],
)
def test_long_values_are_shortened(server: Running, path: str, fields: Fields) -> None:
    answer = httpx.post(server.url + path, json=BODIES[path] | fields)
    assert answer.status_code in (400, 404)
    assert len(answer.json()["error"]["message"]) < 400
