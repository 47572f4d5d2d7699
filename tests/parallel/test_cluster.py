"""Models sharded over processes generate the tokens of one process."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import load
from farthing.model.parameters import random_parameters
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.parallel.cluster import ParallelModel, RankFailed
from farthing.parallel.plan import Layout
from tests.parallel.ranks import rank_options
from tests.tiny import SMALL_V3

RAW = SMALL_V3 | dict(num_experts_per_tok=3, topk_group=2, tie_word_embeddings=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    save_file(random_parameters(ModelConfig.from_json(RAW), seed=7), tmp_path / "model.safetensors")
    return tmp_path


def greedy(model: DecoderModel | ParallelModel, steps: int = 12) -> tuple[list[int], list[int]]:
    """(tokens, drafts) of a prompt, through the paged cache."""
    ids = torch.tensor([5, 9, 11, 2, 30])
    cache = model.new_cache(4, 8, "float32")
    tokens, drafts, start, step = [], [], 0, ids
    with torch.inference_mode():
        for _ in range(steps):
            batch = make_batch([len(step)], [start], [[0, 1, 2, 3]], 8)
            hidden = model.forward(step, batch, cache)
            start += len(step)
            values, top, total = model.top_logits(hidden[-1:], 1)
            logits = model.logits(hidden[-1:])
            assert int(logits.argmax()) == int(top)
            torch.testing.assert_close(values[:, 0], logits.max(-1).values)
            torch.testing.assert_close(total, logits.logsumexp(-1))
            following = torch.cat((step[1:], top[0]))
            drafted = model.draft(following, hidden, batch, cache)
            drafts.append(int(model.draft_top_logits(drafted[-1:], 1)[1]))
            step = top[0]
            tokens.append(int(step))
    return tokens, drafts


LAYOUTS = [Layout(t, p, e) for t in (1, 2) for p in (1, 2) for e in (1, 2) if t * p * e > 1]
FAST = Layout(2, 2, 1)


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=() if x == FAST else pytest.mark.slow, id=repr(x)) for x in LAYOUTS]
)
def test_same_tokens_as_one_rank(checkpoint: Path, layout: Layout) -> None:
    expected = greedy(load(checkpoint, select("reference")))
    model = ParallelModel(rank_options(checkpoint, layout))
    try:
        assert greedy(model) == expected
    finally:
        model.close()


def check_rebalanced(model: ParallelModel) -> None:
    """Experts were placed by token counts reduced without shared memory: three per token and layer."""
    assert not model._counts_shared
    moe = [i for i in range(model.cache_layers) if model.config.is_moe(i)]
    assert set(model._rank.placements) <= set(moe)
    model._count()
    seen = model._counts.sum(1)
    assert all(int(seen[i]) % 3 == 0 and int(seen[i]) > 0 for i in moe)
    layers = [i for i in moe if i < model.config.num_hidden_layers]
    assert len({int(seen[i]) for i in layers}) == 1  # equal in every stage
    placed = model._rank.placements[layers[-1]]
    assert len(placed.ranks) == 2 and sum(map(len, placed.ranks)) == 8 + 2


def test_experts_are_rebalanced_without_shared_memory(checkpoint: Path) -> None:
    expected = greedy(load(checkpoint, select("reference")))
    common: dict[str, Any] = dict(transport="gloo", redundant_experts=2, rebalance_steps=5)
    model = ParallelModel(rank_options(checkpoint, Layout(1, 2, 2), **common))
    try:
        assert greedy(model) == expected
        check_rebalanced(model)
        counts = torch.zeros(model.cache_layers, 8, dtype=torch.int64)
        batch = make_batch([1], [0], [[0]], 8)
        cache = model.new_cache(4, 8, "float32")
        with torch.inference_mode():
            for _ in range(5):  # one of them counts tokens and places the experts
                model.forward(torch.tensor([1]), batch, cache, counts)
        assert counts.sum() > 0  # shown in /metrics
    finally:
        model.close()


@pytest.mark.slow
def test_dead_rank_ends_the_replica_with_a_clear_error(checkpoint: Path) -> None:
    model = ParallelModel(rank_options(checkpoint, Layout(2, 2)))
    try:
        greedy(model, 2)
        os.kill(next(iter(model._workers.pids.values())), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RankFailed, match=r"rank 0 of 4 exited with code -9"):
            while time.monotonic() - began < 10:
                greedy(model, 2)
        assert time.monotonic() - began < 10
    finally:
        model.close()


DISPATCHED = [Layout(1, 1, 2, True), Layout(1, 2, 2, True), Layout(2, 1, 4, True)]


def several(model: DecoderModel | ParallelModel) -> list[torch.Tensor]:
    """Hidden states and drafts: prompts of sequences on both copies, a decode step, one sequence alone."""
    cache, out = model.new_cache(8, 8, "float32"), []
    steps = [([5, 3, 9], [0, 0, 0], [[0, 4], [1], [2, 6]]), ([1, 1, 1], [5, 3, 9], [[0, 4], [1], [2, 6]])]
    steps.append(([2], [10], [[2, 6]]))
    with torch.inference_mode():
        for new, cached, tables in steps:
            batch = make_batch(new, cached, tables, 8)
            ids = (torch.arange(sum(new)) * 7 + len(new)) % 40
            hidden = model.forward(ids, batch, cache)
            out += [hidden, model.draft((ids + 1) % 40, hidden, batch, cache)]
    return out


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=() if x.world == 2 else pytest.mark.slow, id=repr(x)) for x in DISPATCHED],
)
def test_data_parallel_attention_with_expert_dispatch(checkpoint: Path, layout: Layout) -> None:
    expected = several(load(checkpoint, select("reference")))
    model = ParallelModel(rank_options(checkpoint, layout))
    try:
        for mine, theirs in zip(several(model), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    finally:
        model.close()
