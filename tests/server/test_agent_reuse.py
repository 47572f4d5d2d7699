"""A tool loop of ten turns computes only new tokens, with each API, on the embedded model.

The test measures the cached share of a prompt's tokens from earlier turns (the last prompt and its sampled
answer), without the new tool results. The model is too small to call tools, so either the client requires the
call, or a constraint forces it around a freely sampled argument, whose tokens differ from the tokenizer's
split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anthropic
import numpy as np
import pytest

from farthing.config import EngineConfig
from farthing.engine.admission import Admission
from farthing.engine.build import build_engine
from farthing.engine.constraints import Masks
from farthing.engine.tokenizer import Tokenizer
from tests.server.harness import Running, running

TURNS = 10
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"path": {"type": "string", "minLength": 24, "maxLength": 99}},
    "required": ["path"],
    "additionalProperties": False,
}
ASK = "Find the function that parses the header, and say where it is."
Turn = tuple[int, int, int]  # tokens of the prompt, of which cached, and of the answer


class Calling:
    """A constraint with one set of allowed tokens per position of the answer."""

    def __init__(self, script: Sequence[Sequence[int]], place: int = 0) -> None:
        self.script, self.place = script, place

    @property
    def stopped(self) -> bool:
        return self.place == len(self.script)

    def consume(self, token: int) -> None:
        assert token in self.script[self.place]
        self.place += 1

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        ahead = list(zip(tokens, self.script[self.place :], strict=False))
        return next((i for i, (token, allowed) in enumerate(ahead) if token not in allowed), len(ahead))

    def masks(self, drafts: Sequence[int], vocab: int) -> Masks:
        found = np.zeros((1 + len(drafts), vocab), dtype=np.bool_)
        for row, allowed in zip(found, self.script[self.place :], strict=False):
            row[list(allowed)] = True
        return found

    def copy(self) -> Calling:
        return Calling(self.script, self.place)


def a_call(tokenizer: Tokenizer) -> Calling:
    """A call of `read` with a path of 24 tokens of letters."""
    words = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).isalpha()]
    before, after = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>read\n```json\n{"path": "',
            '"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        )
    )
    fixed = [[token] for token in (*before, *after, *tokenizer.eos_token_ids[:1])]
    return Calling([*fixed[: len(before)], *[words] * 24, *fixed[len(before) :]])


@pytest.fixture(params=[False, True], ids=["auto", "required"])
def required(request: pytest.FixtureRequest) -> bool:
    """Whether the client requires a call."""
    return bool(request.param)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch, required: bool) -> Iterator[Running]:
    engine = build_engine(EngineConfig(model="mite", threads=1, max_num_seqs=4))
    assert engine.tokenizer is not None
    if not required:
        call = a_call(engine.tokenizer)
        generation = Admission._generation

        def scripted(
            admission: Admission, request: Any, index: int, seed: int, _: Any, penalized: Any
        ) -> Any:
            return generation(admission, request, index, seed, call.copy(), penalized)

        monkeypatch.setattr(Admission, "_generation", scripted)
    with running(engine) as server:
        yield server


def result(step: int) -> str:
    return f"{step}: def parse_{step}(data): return data[{step}:]"


def chat(server: Running, required: bool) -> Iterator[Turn]:
    client = server.client()
    tool: Any = {"type": "function", "function": {"name": "read", "parameters": SCHEMA}}
    turns: list[Any] = [{"role": "user", "content": ASK}]
    for step in range(TURNS):
        answer = client.chat.completions.create(
            model="tiny", messages=turns, tools=[tool], tool_choice="required" if required else "auto",
            temperature=1.0, seed=step, parallel_tool_calls=False,
        )  # fmt: skip
        (call,), usage = answer.choices[0].message.tool_calls or [], answer.usage
        assert usage and usage.prompt_tokens_details
        yield usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0, usage.completion_tokens
        kept = call.model_dump(include={"id", "type", "function"})
        turns.append({"role": "assistant", "content": None, "tool_calls": [kept]})
        turns.append({"role": "tool", "tool_call_id": call.id, "content": result(step)})


def responses(server: Running, required: bool) -> Iterator[Turn]:
    client = server.client()
    tool: Any = {"type": "function", "name": "read", "parameters": SCHEMA}
    items: list[Any] = [{"role": "user", "content": ASK}]
    for step in range(TURNS):
        answer = client.responses.create(
            model="tiny", input=items, tools=[tool], tool_choice="required" if required else "auto",
            temperature=1.0, extra_body={"seed": step}, parallel_tool_calls=False,
        )  # fmt: skip
        (call,) = [item for item in answer.output if item.type == "function_call"]
        usage = answer.usage
        assert usage
        yield usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": result(step)})


def messages(server: Running, required: bool) -> Iterator[Turn]:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    tool: Any = {"name": "read", "input_schema": SCHEMA}
    turns: list[Any] = [{"role": "user", "content": ASK}]
    for step in range(TURNS):
        answer = client.messages.create(
            model="tiny", max_tokens=400, messages=turns, tools=[tool],
            tool_choice={"type": "any" if required else "auto", "disable_parallel_tool_use": True},
            extra_body={"seed": step, "temperature": 1.0},
        )  # fmt: skip
        (call,) = [block for block in answer.content if block.type == "tool_use"]
        cached = answer.usage.cache_read_input_tokens or 0
        yield answer.usage.input_tokens + cached, cached, answer.usage.output_tokens
        turns.append({"role": "assistant", "content": [block.model_dump() for block in answer.content]})
        block = {"type": "tool_result", "tool_use_id": call.id, "content": result(step)}
        turns.append({"role": "user", "content": [block]})


@pytest.mark.parametrize("api", [chat, responses, messages])
def test_ten_turns_compute_only_new_tokens(
    embedded: Running, required: bool, api: Callable[[Running, bool], Iterator[Turn]]
) -> None:
    turns = list(api(embedded, required))
    assert len(turns) == TURNS
    old = [prompt + answer for prompt, _, answer in turns[:-1]]
    cached = [cached for _, cached, _ in turns[1:]]
    shares = [c / o for c, o in zip(cached, old, strict=True)]
    whole = sum(prompt for prompt, _, _ in turns[1:])
    print(f"{api.__name__}: {sum(cached)} tokens cached: {sum(cached) / sum(old):.2%} of those of earlier "
          f"turns, {sum(cached) / whole:.2%} of whole prompts")  # fmt: skip
    assert min(shares) >= 0.95
    # Only an answer's last token was never computed, and the tags after it may be written again.
    assert all(o - c <= 4 for c, o in zip(cached, old, strict=True)), (old, cached)
