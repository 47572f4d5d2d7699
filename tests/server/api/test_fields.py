"""Fields as clients send them: nulls where OpenAI allows them, the older function calls, odd numbers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from farthing.conversation.forced import schema
from farthing.conversation.types import Conversation, Tool, ToolChoice, Turn
from tests.server.harness import ScriptedEngine, running

USER = [{"role": "user", "content": "hi"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": USER, "max_tokens": 4},
}


def test_null_is_the_default() -> None:
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
def test_numbers_that_are_not_json_are_refused(path: str, number: str) -> None:
    content = json.dumps(PATHS[path])[:-1] + f', "metadata": {{"deep": [{number}]}}}}'
    with running(ScriptedEngine()) as server:
        answer = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "infinity" in answer.json()["error"]["message"]


def test_results_of_the_older_function_calls_reach_the_prompt() -> None:
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


def test_errors_name_fields_and_neither_classes_nor_the_whole_body() -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with running(ScriptedEngine()) as server:
        url = f"{server.url}/v1/chat/completions"
        error = httpx.post(url, json={"messages": image}).json()["error"]
        assert error["param"] == "messages.0.content.0.type"
        error = httpx.post(url, json={"messages": USER, "top_logprobs": 2}).json()["error"]
        assert error["message"] == "top_logprobs needs logprobs = true"
        error = httpx.post(url, json={"messages": USER, "reasoning_effort": "none"}).json()["error"]
        assert "expects none" not in error["message"]


@pytest.mark.parametrize("kind", ["string", "array", ["object", "null"]])
@pytest.mark.parametrize("single", [False, True])
def test_forced_arguments_are_an_object(kind: Any, single: bool) -> None:
    choice = ToolChoice("required", ("f",), single=single)
    forced = schema(Conversation((Turn("user", "x"),), (Tool("f", None, {"type": kind}),), choice))
    assert forced is not None
    assert (forced if single else forced["$defs"]["tool0"])["type"] == "object"
