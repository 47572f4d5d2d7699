"""Stored responses: bounded, per key, and read, listed and continued over HTTP."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from farthing.config import EngineConfig
from farthing.conversation.types import Turn
from farthing.server.memory import ResponseStore
from tests.server.harness import Running, ScriptedEngine, running


@pytest.mark.parametrize(
    "large",
    [
        {"metadata": {"a": "x" * 6_000}},
        {"metadata": {"x" * 6_000: "a"}},
        {"instructions": "x" * 6_000},
        {"tools": [{"type": "mcp", "note": ["x" * 3_000, "x" * 3_000]}]},
        {"metadata": {"a": [0] * 100}},
    ],
)
def test_stored_document_counts_toward_the_bound(large: dict[str, Any]) -> None:
    store = ResponseStore(characters=16_000)
    for number in range(4):
        store.put("a", (), {"id": str(number)} | large)
    kept = [number for number in range(4) if store.get("a", str(number))]
    assert kept == [2, 3]


def test_response_larger_than_the_store_is_not_kept() -> None:
    store = ResponseStore(characters=1_000)
    store.put("a", (Turn("user", "x"),), {"id": "small"})
    store.put("a", (Turn("user", "x"),), {"id": "large", "metadata": {"a": "x" * 2_000}})
    assert store.get("a", "small") is not None
    assert store.get("a", "large") is None


def test_space_is_released() -> None:
    store = ResponseStore(characters=8_000)
    for number in range(8):
        store.put("a", (), {"id": str(number), "metadata": {"a": "x" * 6_000}})
        assert not store.delete("b", str(number))
        assert store.delete("a", str(number))


def test_keys_cannot_read_replace_or_evict_responses_of_others() -> None:
    store = ResponseStore(keys=2, responses=16, characters=32_000)
    store.put("a", (), {"id": "mine", "text": "a's"})
    store.put("b", (), {"id": "mine", "text": "b's"})
    for number in range(100):
        store.put("b", (), {"id": f"b{number}", "text": "x" * 4_000})
    kept = store.get("a", "mine")
    assert kept is not None and kept.document["text"] == "a's"
    assert store.get("b", "mine") is None  # evicted by its own key
    assert store.get("a", "b99") is None and store.get("b", "b99") is not None
    assert not store.delete("a", "b99")


def test_many_keys_have_a_useful_share_each() -> None:
    store = ResponseStore(keys=100_000)
    store.put("a", (), {"id": "large", "text": "x" * 500_000})
    assert store.get("a", "large") is not None


def test_same_id_replaces_and_is_counted_once() -> None:
    store = ResponseStore(characters=10_000)
    for _ in range(20):
        store.put("a", (), {"id": "same", "text": "x" * 4_000})
        store.put("a", (), {"id": "other", "text": "y" * 4_000})
    assert store.get("a", "same") is not None and store.get("a", "other") is not None


def test_input_tokens_are_those_of_the_answer(tiny: Running) -> None:
    client = tiny.client().responses
    tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    first = client.create(model="tiny", input="hi", max_output_tokens=4, instructions="Be brief.")
    fields: list[dict[str, Any]] = [
        {"input": "hi"},
        {"input": "hi", "instructions": "Be brief.", "tools": [tool]},
        {"input": [{"role": "user", "content": "hi"}]},
        {"input": "and?", "previous_response_id": first.id},
    ]
    for each in fields:
        count = client.input_tokens.count(model="tiny", **each)
        answer = client.create(model="tiny", max_output_tokens=1, **each)
        assert answer.usage and count.object == "response.input_tokens"
        assert count.input_tokens == answer.usage.input_tokens
    assert client.input_tokens.count(previous_response_id=first.id).input_tokens > 0
    with pytest.raises(openai.BadRequestError, match="input is missing") as refused:
        client.input_tokens.count(model="tiny")
    assert refused.value.param == "input"
    with pytest.raises(openai.NotFoundError):
        client.input_tokens.count(model="other", input="hi")


def test_input_items_are_listed_in_pages() -> None:
    call = '<｜DSML｜tool_calls><｜DSML｜invoke name="f"></｜DSML｜invoke></｜DSML｜tool_calls>'
    engine = ScriptedEngine([f"Hm.</think>Now:{call}"])
    engine.config = EngineConfig(max_model_len=100_000, num_blocks=64, chat_template="deepseek_v4")
    with running(engine) as server:
        client = server.client().responses
        tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}}
        first = client.create(model="tiny", input="hi", tools=[tool], instructions="S")
        output: Any = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "done"}  # type: ignore[union-attr]
        asked: Any = [output, {"role": "user", "content": "and?"}]
        second = client.create(model="tiny", input=asked, tools=[tool], previous_response_id=first.id)
        (said,) = client.input_items.list(first.id)
        assert said.type == "message" and said.content[0].text == "hi"  # type: ignore[union-attr]
        kinds = ["message", "reasoning", "message", "function_call", "function_call_output", "message"]
        for limit in (1, 2, 20):
            for order in ("asc", "desc"):
                found = list(client.input_items.list(second.id, limit=limit, order=order))  # type: ignore[arg-type]
                assert [item.type for item in found] == kinds[:: 1 if order == "asc" else -1]
                assert len({item.id for item in found}) == len(kinds)
        # They are items that can be sent again.
        again: Any = [
            item.model_dump(exclude_none=True) for item in client.input_items.list(second.id, order="asc")
        ]
        client.create(model="tiny", input=again, tools=[tool], instructions="S")
        assert engine.prompts[2].startswith(engine.prompts[0]) and "done" in engine.prompts[2]
        for options in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_1"}):
            with pytest.raises(openai.BadRequestError, match=next(iter(options))):
                client.input_items.list(first.id, **options)  # type: ignore[arg-type]


def test_only_stored_responses_can_be_read_and_none_is_cancelled() -> None:
    with running(ScriptedEngine()) as server:
        client = server.client().responses
        answer = client.create(model="tiny", input="hi")
        with pytest.raises(openai.BadRequestError, match="only background responses"):
            client.cancel(answer.id)
        with pytest.raises(openai.BadRequestError, match="stream: got true"):
            client.retrieve(answer.id, stream=True)
        for call in (client.cancel, client.input_items.list, client.retrieve, client.delete):
            with pytest.raises(openai.NotFoundError, match="'resp_0' is not stored"):
                call("resp_0")
