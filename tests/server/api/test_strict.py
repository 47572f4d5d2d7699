"""`strict` tools with tool_choice auto on the real engine: calls match their schema."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest

from tests.server.harness import running, tiny_engine, tokenizer

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2]}},
    "required": ["on", "level"],
    "additionalProperties": False,
}
FUNCTION = {"name": "light", "parameters": SCHEMA, "strict": True}


def biased() -> dict[str, int]:
    """Logit bias that makes calls likely."""
    (token,) = tokenizer().encode("<｜tool▁call▁begin｜>", add_special_tokens=False)
    return {str(token): 40}


@pytest.mark.parametrize("speculate", [None, "ngram:3"])
@pytest.mark.parametrize("format_", ["deepseek_v3", "deepseek_v31"])
def test_calls_match_the_schema(format_: str, speculate: str | None) -> None:
    with running(tiny_engine(chat_template=format_, speculate=speculate)) as server:
        body: dict[str, Any] = {"model": "tiny", "seed": 3, "logit_bias": biased(), "max_tokens": 400}
        body |= {"messages": [{"role": "user", "content": "Light!"}]}
        body["tools"] = [{"type": "function", "function": FUNCTION}]
        (choice,) = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"]
        calls = choice["message"]["tool_calls"]
        assert len(calls) > 3
        for call in calls[:-1]:  # the last one may be truncated
            assert call["function"]["name"] == "light"
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


def test_schema_without_a_grammar_is_rejected() -> None:
    parameters = SCHEMA | {"properties": {"on": {"type": "string", "pattern": "(?=a)b"}, "level": {}}}
    with running(tiny_engine()) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        tool = {"type": "function", "function": FUNCTION | {"parameters": parameters}}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"tools": [tool]}, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools", answer.text
        message = answer.json()["error"]["message"]
        assert "the schema of a tool is not accepted: " in message and "llguidance" not in message
        tool["function"] |= {"strict": False}
        fields = {"tools": [tool], "tool_choice": "required"}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body | fields, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["message"] == message
        tool = {"name": "light", "input_schema": parameters, "strict": True}
        answer = httpx.post(f"{server.url}/v1/messages", json=body | {"tools": [tool]}, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
        function = FUNCTION | {"type": "function", "parameters": parameters}
        answer = httpx.post(
            f"{server.url}/v1/responses", json={"input": "x", "tools": [function]}, timeout=60
        )
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
