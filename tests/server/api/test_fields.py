"""Fields as sent by clients: nulls that OpenAI allows, legacy function calls, odd numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from farthing.conversation.forced import schema
from farthing.conversation.types import Conversation, Tool, ToolChoice, Turn
from farthing.server.api.messages_protocol import MessagesRequest
from farthing.server.api.openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from farthing.server.api.responses_protocol import ResponsesRequest
from tests.server.harness import ScriptedEngine, running

USER = [{"role": "user", "content": "hi"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": USER, "max_tokens": 4},
}


def test_null_means_the_default() -> None:
    with running(ScriptedEngine()) as server:
        for path in ("/v1/chat/completions", "/v1/completions"):
            for name in ("n", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "stream"):
                answer = httpx.post(server.url + path, json=PATHS[path] | {name: None})
                assert answer.status_code == 200, (path, name, answer.text)
                assert len(answer.json()["choices"]) == 1
        body = {"prompt": ["a", "b"], "echo": None, "n": None, "best_of": 1}
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
        options = {"include_usage": None, "continuous_usage_stats": None}
        body = {"prompt": "a", "stream": True, "stream_options": options}
        assert httpx.post(f"{server.url}/v1/completions", json=body).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("path", PATHS)
def test_non_json_numbers_are_rejected(path: str, number: str) -> None:
    content = json.dumps(PATHS[path])[:-1] + f', "metadata": {{"deep": [{number}]}}}}'
    with running(ScriptedEngine()) as server:
        answer = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "infinity" in answer.json()["error"]["message"]


def test_results_of_legacy_function_calls_reach_the_prompt() -> None:
    engine = ScriptedEngine()
    messages = [
        *USER,
        {"role": "assistant", "content": None, "function_call": {"name": "look_up", "arguments": "{}"}},
        {"role": "function", "name": "look_up", "content": "forty-two"},
    ]
    functions = [{"name": "look_up", "parameters": {"type": "object"}}]
    with running(engine) as server:
        body = {"messages": messages, "functions": functions}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert "look_up" in engine.prompts[-1].rsplit("<｜User｜>", 1)[-1]
        assert "forty-two" in engine.prompts[-1]


def test_errors_name_fields_but_not_classes_or_the_whole_body() -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with running(ScriptedEngine()) as server:
        url = f"{server.url}/v1/chat/completions"
        error = httpx.post(url, json={"messages": image}).json()["error"]
        assert error["param"] == "messages[0].content[0].type"
        error = httpx.post(url, json={"messages": USER, "top_logprobs": 2}).json()["error"]
        assert error["message"] == "top_logprobs needs logprobs = true"


@pytest.mark.parametrize("kind", ["string", "array", ["object", "null"]])
@pytest.mark.parametrize("single", [False, True])
def test_forced_arguments_are_an_object(kind: Any, single: bool) -> None:
    choice = ToolChoice("required", ("f",), single=single)
    forced = schema(Conversation((Turn("user", "x"),), (Tool("f", None, {"type": kind}),), choice))
    assert forced is not None
    assert (forced if single else forced["$defs"]["tool0"])["type"] == "object"


# Required outer fields of nested ones.
AROUND: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "a", "content": "x"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "auto",
            "response_format": {"type": "text"},
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"messages": USER, "structured_outputs": {"regex": "a"}, "thinking": {"type": "adaptive"}},
    ],
    "/v1/completions": [{"prompt": "hi"}],
    "/tokenize": [{"prompt": "hi"}, {"messages": USER}],
    "/detokenize": [{"tokens": [1]}],
    "/v1/responses": [
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]},
            ],
            "tools": [
                {"type": "function", "name": "f"},
                {"type": "custom", "name": "g"},
                {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "h"}]},
            ],
            "text": {"format": {"type": "text"}},
            "reasoning": {},
        }
    ],
    "/v1/messages": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "x"},
                        {"type": "tool_use", "id": "t", "name": "f", "input": {}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]},
            ],
            "max_tokens": 4,
            "system": [{"type": "text", "text": "hi"}],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto"},
            "thinking": {"type": "adaptive"},
            "output_config": {},
        }
    ],
}
BODIES = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
}


def nulled(body: Any, model: BaseModel) -> Iterator[tuple[str, Any]]:
    """Every body with one optional field, at any depth, set to null."""
    for name, field in type(model).model_fields.items():
        key, inner = field.alias or name, getattr(model, name)
        if not field.is_required() and key != "type":
            yield key, body | {key: None}
        if isinstance(inner, BaseModel):
            yield from ((f"{key}.{path}", body | {key: part}) for path, part in nulled(body[key], inner))
        elif isinstance(inner, list):
            for at, item in enumerate(inner):
                if isinstance(item, BaseModel):
                    yield from (
                        (f"{key}.{at}.{path}", body | {key: [*body[key][:at], part, *body[key][at + 1 :]]})
                        for path, part in nulled(body[key][at], item)
                    )


def test_null_is_absent_in_every_optional_field() -> None:
    needed = {"prompt", "messages", "role", "content", "tools", "call_id", "name", "arguments", "output"}
    needed |= {"json_schema", "regex", "stream", "input_schema", "id", "tool_calls", "text"}  # needed here
    seen = 0
    with running(ScriptedEngine()) as server, httpx.Client(base_url=server.url) as client:
        for path, bodies in AROUND.items():
            for body in bodies:
                assert client.post(path, json=body).status_code == 200, (path, body)
                for field, changed in nulled(body, BODIES[path].model_validate(body)):
                    if field.rpartition(".")[2] in needed:
                        continue
                    answer = client.post(path, json=changed)
                    assert answer.status_code == 200, (path, field, answer.text)
                    seen += 1
    assert seen > 200
