"""Reasoning over HTTP with the real engine: budgets exact to a token, structured output after it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from tests.server.harness import Running, events, running, tiny_model, tokenizer
from tests.server.test_chat import PARAMETERS, THINKING, TOOLS, USER

CLOSE = tokenizer().encode("</think>", add_special_tokens=False)[0]


@pytest.fixture(scope="module", params=[None, "ngram:4"])
def thinker(request: pytest.FixtureRequest) -> Iterator[Running]:
    """The tiny model with a template that opens the reasoning, with and without speculation."""
    config = EngineConfig(
        max_num_seqs=8, num_blocks=512, block_size=4, max_num_batched_tokens=256, speculate=request.param
    )
    with running(Engine(tiny_model(), config, tokenizer(THINKING))) as server:
        yield server


def ask(server: Running, **fields: Any) -> dict[str, Any]:
    body = {"messages": USER, "max_tokens": 40, "seed": 1} | fields
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def reasoning_tokens(document: dict[str, Any]) -> int:
    return int(document["usage"]["completion_tokens_details"]["reasoning_tokens"])


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_budget_is_exact(thinker: Running, budget: int, temperature: float) -> None:
    # Without the budget the model would never end its reasoning.
    options = {"logit_bias": {str(CLOSE): -100}, "ignore_eos": True, "temperature": temperature}
    for fields in (
        {"thinking": {"type": "enabled", "budget_tokens": budget}},
        {"max_thinking_tokens": budget},
    ):
        document = ask(thinker, **options, **fields)
        assert reasoning_tokens(document) == budget
        assert document["usage"]["completion_tokens"] == 40
        assert document["choices"][0]["message"]["content"]
    assert reasoning_tokens(ask(thinker, **options)) == 40


def test_streams_count_the_same(thinker: Running) -> None:
    body = {"messages": USER, "max_tokens": 30, "max_thinking_tokens": 9, "ignore_eos": True, "stream": True}
    body |= {"logit_bias": {str(CLOSE): -100}}
    body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    text = httpx.post(f"{thinker.url}/v1/chat/completions", json=body, timeout=60).text
    *chunks, last, done = events(text)
    assert done == "[DONE]" and last["choices"] == []
    assert reasoning_tokens(last) == 9
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 30


def test_structured_output_follows_the_reasoning(thinker: Running) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    options = {"max_tokens": 200, "max_thinking_tokens": 5, "logit_bias": {str(CLOSE): -100}}
    document = ask(thinker, response_format=schema, **options)
    message = document["choices"][0]["message"]
    jsonschema.validate(json.loads(message["content"]), PARAMETERS)
    assert reasoning_tokens(document) == 5


def test_required_call_follows_the_reasoning(thinker: Running) -> None:
    options = {"max_tokens": 300, "max_thinking_tokens": 5, "logit_bias": {str(CLOSE): -100}}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        document = ask(thinker, tools=TOOLS[:1], tool_choice=choice, **options)
        message = document["choices"][0]["message"]
        assert message["content"] is None
        for call in message["tool_calls"]:
            jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)


def test_forbidden_words_and_tokens(thinker: Running) -> None:
    letters = tokenizer().encode("xyz", add_special_tokens=False)
    document = ask(
        thinker,
        allowed_token_ids=letters,
        bad_words=["y", "xz"],
        max_tokens=30,
    )
    message = document["choices"][0]["message"]
    text = (message.get("reasoning_content") or "") + (message["content"] or "")
    assert len(text) == 30 and set(text) <= set("xz") and "xz" not in text


GEMMA = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|channel>thought\n{# <|tool_call> #}"


def test_prompt_that_ends_within_a_thought() -> None:
    """As Gemma 4's does after a tool's result. A grammar of the whole answer ends the thought first."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    config = EngineConfig(max_num_seqs=8, num_blocks=512, block_size=4)
    with running(Engine(tiny_model(), config, tokenizer(GEMMA))) as server:
        letters = tokenizer().encode("xyz", add_special_tokens=False)
        message = ask(server, allowed_token_ids=letters)["choices"][0]["message"]
        assert len(message["reasoning_content"]) == 40 and not message["content"]
        message = ask(server, response_format=schema, max_tokens=200)["choices"][0]["message"]
        jsonschema.validate(json.loads(message["content"]), PARAMETERS)
        assert not message.get("reasoning_content")
