"""The engine generates transformers' greedy tokens of every type: with preemption, drafts and prefix hits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import lcm
from pathlib import Path

import pytest
import torch

from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.request import SamplingParams
from farthing.engine.speculation import Speculator
from farthing.model.decoder import DecoderModel
from farthing.model.load import load
from farthing.ops.select import select

pytest.importorskip("transformers")

from tests.engine.conftest import Always, Guesses, tokens_of

from .families import FAMILIES, GROUPED, build, exact_logits
from .paged import continues_greedily, greedy

LONG = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
TYPES = [pytest.param(name, marks=() if name in GROUPED else pytest.mark.slow) for name in FAMILIES]


@contextmanager
def engine_of(model: DecoderModel, size: int, blocks: int, guesses: Guesses) -> Iterator[Engine]:
    """An engine that drafts these; its invariants are checked at the end."""
    config = EngineConfig(
        max_num_seqs=3, num_blocks=blocks, block_size=size, max_num_batched_tokens=10, speculate="ngram"
    )
    engine = Engine(model, config)
    try:
        engine._core._speculator = Speculator([guesses], Always)
        yield engine
        assert guesses.wrong and engine.stats.snapshot().accepted_tokens > 0
    finally:
        engine.shutdown()
    engine._core.scheduler.check()


@pytest.mark.parametrize("name", TYPES)
def test_greedy_tokens_of_an_engine(name: str, tmp_path: Path) -> None:
    theirs = build(name, 1, tmp_path)
    model = load(tmp_path, select("cpu", torch.float32, 1))
    size, rng = lcm(4, model.config.block_tokens), random.Random(name)
    start = [rng.randrange(2, 60) for _ in range(9)]
    prompts = [[*start, *(rng.randrange(2, 60) for _ in range(9 + i))] for i in range(3)]
    texts = [prompt + greedy(model, torch.tensor(prompt), LONG.max_tokens) for prompt in prompts]
    with engine_of(model, size, 124 // size, Guesses(*texts)) as engine:
        streams = [engine.submit(prompt, LONG, kind="final") for prompt in prompts]
        answers = [tokens_of(stream.result()) for stream in streams]
        assert engine.stats.snapshot().preemptions > 0
    prompts.append([*texts[0][: len(prompts[0]) + 20], 3, 4])
    texts.append(prompts[-1] + greedy(model, torch.tensor(prompts[-1]), LONG.max_tokens))
    with engine_of(model, size, 800 // size, Guesses(*texts)) as engine:
        first = tokens_of(engine.submit(prompts[0], replace(LONG, max_tokens=20)).result())
        assert prompts[-1][:-2] == [*prompts[0], *first]
        again = engine.submit(prompts[-1], LONG).result()
        assert again.num_cached_tokens >= len(prompts[0]) // size * size
        answers.append(tokens_of(again))
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = exact_logits(theirs, torch.tensor([*prompt, *answer[:-1]]))
        assert continues_greedily(logits, len(prompt), answer)
