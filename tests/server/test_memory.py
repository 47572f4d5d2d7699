"""A conversation's next prompt starts with the exact tokens of its last answer, which are cached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.config import EngineConfig
from farthing.conversation.types import Answer, ToolCall, Turn
from farthing.engine.build import build_engine
from farthing.server.memory import AnswerMemory, ResponseStore
from tests.server.api.loops import FORMATS, SCHEMA, arguments, result
from tests.server.harness import EOS, Running, ScriptedEngine, running, tokenizer

BLOCK = 16


@pytest.fixture(scope="module")
def mite() -> Iterator[Running]:
    """The embedded model."""
    with running(
        build_engine(EngineConfig(model="mite", threads=1, max_num_seqs=4, block_size=BLOCK))
    ) as server:
        yield server


def test_sampled_text_is_not_recomputed(mite: Running) -> None:
    """Ten turns of text sampled at a temperature at which the tokenizer often splits it differently."""
    url, turns = f"{mite.url}/v1/chat/completions", [{"role": "user", "content": "x = 1"}]
    end = mite.service.require_engine().tokenizer.eos_token_ids[0]  # type: ignore[union-attr]
    before, reason = 0, ""
    for number in range(10):
        body: dict[str, Any] = {"messages": turns, "max_tokens": 60, "temperature": 2.0, "seed": number}
        body |= {"logit_bias": {str(end): 14}}
        document = httpx.post(url, json=body, timeout=60).json()
        (choice,), usage = document["choices"], document["usage"]
        if reason == "stop":
            added = usage["prompt_tokens"] - before
            assert added < 20  # tokens of the question and the turn markers
            assert usage["prompt_tokens_details"]["cached_tokens"] >= before - BLOCK
        before, reason = usage["prompt_tokens"] + usage["completion_tokens"], choice["finish_reason"]
        turns += [
            {"role": "assistant", "content": choice["message"]["content"]},
            {"role": "user", "content": f"y = {number}"},
        ]
    assert sum(map(len, mite.service.answers._kept.values())) > 5  # most answers ended with EOS


class EndingEngine(ScriptedEngine):
    """A scripted model whose answers end with a token, like a real one's."""

    def _say(self, stream: Any, text: str, ids: list[int], reason: Any) -> None:
        ends = reason is not None and stream.request.kind == "delta"
        super()._say(stream, text, ids + tokenizer().encode(EOS, False) * ends, reason)


def write(format_: str, step: int) -> str:
    """A call with blanks that no serializer would write, and text surrounded by white space."""
    call, opened = FORMATS[format_]
    text = "\n I should add. \n</think>\n\n" if opened else ""
    loose = call([("add", arguments(step))]).replace('": ', '" :  ').replace(", ", " ,")
    return f"{text}  Step {step}.\n\n{loose}"


@pytest.mark.parametrize("format_", FORMATS)
def test_tool_calls_are_replayed_exactly(format_: str) -> None:
    if format_ == "deepseek_r1":
        pytest.skip("R1 drops the reasoning of earlier turns")
    said: list[str] = []

    def say(prompt: str) -> list[str]:
        said.append(write(format_, prompt.count("RESULT-")))
        return [said[-1]]

    engine = EndingEngine(say)
    engine.config = EngineConfig(max_model_len=100_000, num_blocks=64, chat_template=format_)
    with running(engine) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        turns: list[Any] = [{"role": "user", "content": "Add."}]
        tool: Any = {"name": "add", "input_schema": SCHEMA}
        for step in range(10):
            with client.messages.stream(model="tiny", max_tokens=999, messages=turns, tools=[tool]) as stream:
                final = stream.get_final_message()
            if step:
                assert engine.prompts[step].startswith(engine.prompts[step - 1] + said[step - 1])
            turns.append({"role": "assistant", "content": [block.model_dump() for block in final.content]})
            block = {"type": "tool_result", "tool_use_id": final.content[-1].id, "content": result(step)}  # type: ignore[union-attr]
            turns.append({"role": "user", "content": [block]})


def test_other_clients_and_edited_answers_are_not_replayed() -> None:
    memory = AnswerMemory()
    answer = Answer("Hello. ", "why", (("id", "f", '{"a": 1, "b": 2}'),))
    memory.remember("me", "PROMPT", [1, 2, 3], answer)
    call = ToolCall("other id", "f", '{"b":2,"a":1}')
    turn = Turn("assistant", "Hello.", "why", (call,))
    found = memory.recall("me", turn, "PROMPT and more")
    assert found is not None and found.tokens.tolist() == [1, 2, 3]
    assert memory.recall("me", Turn("assistant", "Hello.", "", (call,)), "PROMPT") is not None
    assert memory.recall("you", turn, "PROMPT") is None
    assert memory.recall("me", turn, "Prompt") is None
    assert memory.recall("me", turn, "PROM") is None
    assert memory.recall("me", Turn("assistant", "Hello!", "why", (call,)), "PROMPT") is None
    assert memory.recall("me", Turn("assistant", "Hello.", "because", (call,)), "PROMPT") is None
    changed = ToolCall("id", "f", json.dumps({"a": 2, "b": 2}))
    assert memory.recall("me", Turn("assistant", "Hello.", "why", (changed,)), "PROMPT") is None


def test_long_arguments_are_compared_as_they_are() -> None:
    """Parsing and writing them again would hold the event loop."""
    memory, long = AnswerMemory(), "x" * 70_000
    sent, other = json.dumps({"a": long, "b": 2}), json.dumps({"b": 2, "a": long})
    memory.remember("me", "p", [1], Answer("", "", (("id", "f", sent),)))
    assert memory.recall("me", Turn("assistant", calls=(ToolCall("id", "f", sent),)), "p") is not None
    assert memory.recall("me", Turn("assistant", calls=(ToolCall("id", "f", other),)), "p") is None


def test_stored_answers_are_bounded() -> None:
    memory = AnswerMemory(tokens=100)
    for number in range(50):
        memory.remember("me", f"p{number}", list(range(10)), Answer(str(number % 7), "", ()))
        assert memory._used <= 100
        kept = [e for answers in memory._kept.values() for entries in answers.values() for e in entries]
        assert memory._used == sum(len(entry.tokens) for entry in kept)
    memory.remember("me", "p", list(range(101)), Answer("big", "", ()))
    assert memory.recall("me", Turn("assistant", "big"), "p") is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), max_size=60))
def test_an_answer_is_evicted_only_for_a_client_that_has_less(answers: list[tuple[str, int]]) -> None:
    memory = AnswerMemory(tokens=90)
    for number, (client, tokens) in enumerate(answers):
        memory.remember(client, "p", [1] * tokens, Answer(str(number), "", ()))
        used = {name: memory._shares.used(name) for name in memory._kept}
        assert sum(used.values()) == memory._used <= 90
    for client in {client for client, _ in answers}:  # its last answers, up to its part of the room
        mine, seen = [(n, tokens) for n, (name, tokens) in enumerate(answers) if name == client], 0
        for number, tokens in reversed(mine):
            seen += tokens
            if seen > 90 // 3:
                break
            assert memory.recall(client, Turn("assistant", str(number)), "p") is not None


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
