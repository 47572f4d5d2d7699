"""Unknown fields at any depth: counted and logged once, or refused with --strict-fields."""

from __future__ import annotations

from typing import Any

import anthropic
import anthropic.types
import httpx
import openai.types.chat
import openai.types.responses
import pytest

from farthing.config import EngineConfig
from tests.server.api.loops import FORMATS
from tests.server.harness import ScriptedEngine, letters, running

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"foo": 1}}}
# Path -> a body with unknown fields at several depths, and their names.
BODIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "/v1/chat/completions": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi", "foo": 1}], "foo": 1},
                {"role": "assistant", "tool_calls": [CALL | {"foo": 1}]},
            ],
            "tools": [TOOL | {"foo": 1}],
        },
        ["messages.content.foo", "messages.foo", "messages.tool_calls.foo", "tools.foo"],
    ),
    "/v1/responses": (
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi", "foo": 1}], "foo": 1},
                {"type": "shell_call", "call_id": "c", "action": {}, "bar": 1},
            ],
            "tools": [
                {"type": "web_search", "foo": 1, "external_web_access": False},
                {"type": "function", "name": "f", "bar": 1},
            ],
        },
        ["input.content.foo", "input.foo", "input.bar", "tools.foo", "tools.bar"],
    ),
    "/v1/messages": (
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "foo": 1}], "foo": 1}],
            "max_tokens": 9,
            "tools": [{"name": "f", "input_schema": {"foo": 1}, "foo": 1}],
            "thinking": {"type": "disabled", "foo": 1},
        },
        ["messages.content.foo", "messages.foo", "tools.foo", "thinking.foo"],
    ),
}


def without(body: Any, names: list[str]) -> Any:
    """A body without fields of these names."""
    if isinstance(body, list):
        return [without(item, names) for item in body]
    if not isinstance(body, dict):
        return body
    return {
        key: value if key in ("parameters", "input_schema") else without(value, names)
        for key, value in body.items()
        if key not in names
    }


@pytest.mark.parametrize("path", BODIES)
def test_nested_unknown_fields_are_counted(path: str, caplog: pytest.LogCaptureFixture) -> None:
    body, names = BODIES[path]
    engine = ScriptedEngine()
    with running(engine) as server:
        for _ in range(2):
            answer = httpx.post(server.url + path, json=body)
            assert answer.status_code == 200, answer.text
        metrics = httpx.get(f"{server.url}/metrics").text
        for name in names:
            assert f'farthing:unknown_request_fields_total{{field="{name}"}} 2.0' in metrics, name
            logged = [record.getMessage() for record in caplog.records if repr(name) in record.getMessage()]
            assert len(logged) == 1, name
        assert '"bar"' not in engine.prompts[0]


@pytest.mark.parametrize("path", BODIES)
def test_nested_unknown_fields_are_refused_if_strict(path: str) -> None:
    body, names = BODIES[path]
    with running(ScriptedEngine(), strict_fields=True) as server:
        answer = httpx.post(server.url + path, json=body)
        assert answer.status_code == 400 and "is not a known field" in answer.json()["error"]["message"]
        assert path == "/v1/messages" or "[0]" in answer.json()["error"]["param"]
        fine = without(body, ["foo", "bar"])
        answer = httpx.post(server.url + path, json=fine)
        assert answer.status_code == 200, answer.text
        for name in names:  # one of them is enough
            key = name.rpartition(".")[2]
            answer = httpx.post(server.url + path, json=without(body, [{"foo": "bar", "bar": "foo"}[key]]))
            assert answer.status_code == 400, name


def test_blocks_of_anthropics_sdk_are_known() -> None:
    write, _ = FORMATS["deepseek_v4"]
    engine = ScriptedEngine(letters("why</think>text" + write([("f", {"a": 1})])))
    engine.config = EngineConfig(max_model_len=10_000, chat_template="deepseek_v4")
    with running(engine, strict_fields=True) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        options: Any = {"model": "tiny", "max_tokens": 99}
        options["tools"] = [{"name": "f", "input_schema": {"type": "object"}}]
        turns: list[Any] = [{"role": "user", "content": "hi"}]
        answer = client.messages.create(messages=turns, **options)
        blocks = [block.model_dump() for block in answer.content]
        for block in blocks:  # what Anthropic's own answers contain
            block |= {"citations": []} if block["type"] == "text" else {}
            block |= {"caller": {"type": "direct"}} if block["type"] == "tool_use" else {}
        result = {"type": "tool_result", "tool_use_id": blocks[-1]["id"], "content": "b"}
        turns += [{"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
        assert client.messages.create(messages=turns, **options).content


def test_every_field_of_the_sdks_items_and_blocks_is_known() -> None:
    from farthing.server.api import messages_protocol, responses_protocol
    from farthing.server.api.openai_protocol import Message

    items, blocks = openai.types.responses, anthropic.types
    pairs: list[tuple[Any, Any]] = [
        (items.ResponseOutputMessage, responses_protocol.Item),
        (items.ResponseReasoningItem, responses_protocol.Item),
        (items.ResponseFunctionToolCall, responses_protocol.Item),
        (items.ResponseCustomToolCall, responses_protocol.Item),
        (items.ResponseOutputText, responses_protocol.Part),
        (items.ResponseOutputRefusal, responses_protocol.Part),
        (openai.types.chat.ChatCompletionMessage, Message),
        (blocks.TextBlock, messages_protocol.TextBlock),
        (blocks.ThinkingBlock, messages_protocol.ThinkingBlock),
        (blocks.ToolUseBlock, messages_protocol.ToolUseBlock),
    ]
    for theirs, ours in pairs:
        names = {field.alias or name for name, field in theirs.model_fields.items()}
        declared = {field.alias or name for name, field in ours.model_fields.items()}
        assert names <= declared | ours.known, (theirs, names - declared - ours.known)
