"""A conversation's next prompt starts with the exact tokens of its last answer, which are cached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from farthing.config import EngineConfig
from farthing.conversation.deltas import Answer
from farthing.conversation.types import ToolCall, Turn
from farthing.engine.build import build_engine
from farthing.server.replay import AnswerMemory
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
    assert len(mite.service.answers._kept) > 5  # most answers ended with EOS


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


def test_stored_answers_are_bounded() -> None:
    memory = AnswerMemory(tokens=100)
    for number in range(50):
        memory.remember("me", f"p{number}", list(range(10)), Answer(str(number % 7), "", ()))
        assert memory._used <= 100
        assert memory._used == sum(len(e.tokens) for entries in memory._kept.values() for e in entries)
    memory.remember("me", "p", list(range(101)), Answer("big", "", ()))
    assert memory.recall("me", Turn("assistant", "big"), "p") is None
