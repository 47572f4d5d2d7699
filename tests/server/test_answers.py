"""The memory of answers: who gets which tokens back, how much it keeps, and what enters a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from farthing.server.memory import AnswerMemory, Prompt
from tests.growth import cost
from tests.server.api.loops import FORMATS, SCHEMA, THOUGHTLESS, result
from tests.server.harness import EOS, Running, ScriptedEngine, running, tokenizer

BLOCK = 16
TOKENIZER = tokenizer()
NOTE = 'a "b"\n <c> \\'  # which models and serializers write alike
ASSISTANT = "<｜Assistant｜>"


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
    before, reason, said, plain = 0, "", "", 0
    for number in range(10):
        body: dict[str, Any] = {"messages": turns, "max_tokens": 60, "temperature": 2.0, "seed": number}
        body |= {"logit_bias": {str(end): 14}}
        document = httpx.post(url, json=body, timeout=60).json()
        (choice,), usage = document["choices"], document["usage"]
        if reason == "stop":
            added = usage["prompt_tokens"] - before
            assert added < 20  # tokens of the question and the turn markers
            if said == said.strip():  # else the prompt has another text: it is written without the blanks
                plain += 1
                assert usage["prompt_tokens_details"]["cached_tokens"] >= before - BLOCK
        before, reason = usage["prompt_tokens"] + usage["completion_tokens"], choice["finish_reason"]
        said = choice["message"]["content"]
        turns += [
            {"role": "assistant", "content": choice["message"]["content"]},
            {"role": "user", "content": f"y = {number}"},
        ]
    assert mite.service.answers.continued["sampled"] >= plain > 1


class EndingEngine(ScriptedEngine):
    """A scripted model whose answers end with a token, like a real one's."""

    def _say(self, stream: Any, text: str, ids: list[int], reason: Any) -> None:
        ends = reason is not None and stream.request.kind == "delta"
        super()._say(stream, text, ids + tokenizer().encode(EOS, False) * ends, reason)


@pytest.mark.parametrize("format_", FORMATS)
def test_tool_calls_are_replayed_exactly(format_: str) -> None:
    if format_ == "deepseek_r1":
        pytest.skip("R1 drops the reasoning of earlier turns")
    call, opened = FORMATS[format_]
    said: list[str] = []

    def say(prompt: str) -> list[str]:
        step = prompt.count("RESULT-")
        thought = "I should add.</think>" if opened else THOUGHTLESS.get(format_, "")
        said.append(f"{thought}Step {step}.{call([('add', {'step': step, 'note': NOTE, 'tags': [step]})])}")
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


def prompt(memory: AnswerMemory, text: str, client: str = "me") -> Prompt:
    """A prompt's tokens; the tokenizer has one per byte."""
    return memory.prompt(client, TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER)


def remember(memory: AnswerMemory, asked: str, answer: list[int], client: str = "me") -> None:
    memory.remember(client, prompt(memory, f"<｜User｜>{asked}{ASSISTANT}", client), answer)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_an_answer_is_found_by_its_client_its_prompt_and_its_text() -> None:
    memory = AnswerMemory()
    remember(memory, "one", ids(f"Hello.</think>Yes{EOS}"))
    begin = f"<｜User｜>one{ASSISTANT}"
    for text, continued in (
        (f"{begin}Hello.</think>Yes{EOS}", "sampled"),
        (f"{begin}Hello.</think>Yes<｜User｜>and?", "sampled"),  # the template writes another end
        (f"{begin}Hello.</think>Yes", "sampled"),
        (f"{begin}Hello.</think>Yes!{EOS}", "changed"),
        (f"{begin}Hello</think>Yes{EOS}", "changed"),
        (f"{begin}Hello.</think>No{EOS}", "changed"),
        (f"{begin}Yes{EOS}", "changed"),  # without its reasoning
        (f"{begin}{EOS}", "changed"),
        (begin, None),
        (f"<｜User｜>two{ASSISTANT}Hello.</think>Yes{EOS}", None),
        ("one Hello. Yes", None),
    ):
        found = prompt(memory, text)
        assert (found.latest, found.ids) == (continued, ids(text)), text
    assert prompt(memory, f"{begin}Hello.</think>Yes{EOS}", "you").latest is None


def test_stored_answers_are_bounded() -> None:
    memory = AnswerMemory(tokens=2000)
    for number in range(50):
        remember(memory, str(number), ids(f"{number % 7}{EOS}"))
        assert 0 < memory._used <= 2000
        assert memory._used == memory._shares.used("me")
    remember(memory, "big", ids("x" * 2000))
    assert prompt(memory, f"<｜User｜>big{ASSISTANT}{'x' * 2000}").latest is None
    assert prompt(memory, f"<｜User｜>49{ASSISTANT}0{EOS}").latest == "sampled"


def test_answers_to_one_prompt_are_bounded_and_one_that_repeats_is_kept_once() -> None:
    memory = AnswerMemory()
    for number in range(1500):
        remember(memory, "one", ids(f"{number}{EOS}"))
        remember(memory, "one", ids(f"{number}{EOS}"))
    ((kept,),) = (each.values() for each in memory._kept.values())
    assert len(kept) == 1024
    for number, found in (
        (0, "changed"),
        (1499 - 1024, "changed"),
        (1499 - 1023, "sampled"),
        (1499, "sampled"),
    ):
        assert prompt(memory, f"<｜User｜>one{ASSISTANT}{number}{EOS}").latest == found


def test_a_prompt_costs_what_it_has_and_not_what_is_stored() -> None:
    """A client stores long answers, or long beginnings of answers, at each turn of a short conversation."""
    mark = ids("<｜User｜>")

    def read(size: int) -> float:
        memory, asked = AnswerMemory(tokens=1 << 30), list(mark)
        for _ in range(16):
            found = memory.prompt("me", asked, TOKENIZER)
            for number in range(4):
                begun = ids("ab") * (size // 2 + number)
                memory.remember("me", replace(found, ids=asked + begun), ids(f"!{EOS}"))
                memory.remember("me", found, ids(f"c{number}") * (size // 2))
            asked += ids("ab") + mark
        return min(cost(lambda: memory.prompt("me", asked, TOKENIZER)) for _ in range(5))

    assert read(8_000) < 2 * read(80) + 0.002


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), max_size=60))
def test_an_answer_is_evicted_only_for_a_client_that_has_less(answers: list[tuple[str, int]]) -> None:
    room = 12 * 158
    memory = AnswerMemory(tokens=room)
    for number, (client, tokens) in enumerate(answers):
        remember(memory, str(number), ids("x" * tokens), client)
        used = {name: memory._shares.used(name) for name in memory._kept}
        assert sum(used.values()) == memory._used <= room
    for client in {client for client, _ in answers}:  # its last answers, up to its part of the room
        mine, seen = [(n, tokens) for n, (name, tokens) in enumerate(answers) if name == client], 0
        for number, tokens in reversed(mine):
            seen += tokens + 128
            if seen > room // 3:
                break
            text = f"<｜User｜>{number}{ASSISTANT}{'x' * tokens}{EOS}"
            assert prompt(memory, text, client).latest == "sampled"
