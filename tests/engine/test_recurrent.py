"""Recurrent states in the engine: a small Qwen3-Next on the CPU kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing.engine.request import SamplingParams
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from tests.served import served_model
from tests.tiny import QWEN3_NEXT

from .conftest import EOS, VOCAB, Always, Greedy, MakeEngine, greedy_of, tokens_of
from .test_engine import PROMPTS

MORE = dict(vocab_size=VOCAB, eos_token_id=EOS, num_nextn_predict_layers=1)
CONFIG = ModelConfig.from_json(QWEN3_NEXT | MORE)
LONG = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    torch.set_num_threads(1)
    return served_model(CONFIG, dtype="float32")


@pytest.fixture(scope="module")
def greedy() -> Greedy:
    """Greedy tokens of a second model, because the kernels run one call at a time."""
    return greedy_of(served_model(CONFIG, dtype="float32"))


@pytest.mark.parametrize(
    "config",
    [
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"num_blocks": 40, "max_num_seqs": 4},
        {"speculate": "ngram"},
        {"speculate": "mtp:2"},
    ],
    ids=["chunks", "preempts", "ngram", "mtp"],
)
def test_tokens_are_those_of_one_sequence(
    make_engine: MakeEngine, greedy: Greedy, config: dict[str, Any]
) -> None:
    engine = make_engine(**config)
    if "speculate" in config:
        engine._core._speculator.gates = (Always(),)  # type: ignore[union-attr]
    streams = [engine.submit(p, LONG, kind="final") for p in PROMPTS]
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert tokens_of(stream.result()) == greedy(prompt, 64)
    assert engine.stats.snapshot().preemptions > 0 or "num_blocks" not in config


def test_second_turn_continues_from_a_kept_state(make_engine: MakeEngine, greedy: Greedy) -> None:
    engine = make_engine()
    prompt = list(range(30, 50))
    first = engine.submit(prompt, LONG).result()
    turn = [*prompt, *tokens_of(first), 3, 4]
    second = engine.submit(turn, LONG).result()
    assert second.num_cached_tokens > len(prompt)
    assert tokens_of(second) == greedy(turn, 64)
    assert tokens_of(engine.submit(prompt, LONG).result()) == greedy(prompt, 64)
