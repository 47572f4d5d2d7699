"""Every model type over two ranks: tensor, pipeline and expert parallelism give the tokens of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.model import DeepseekModel, load
from farthing.ops import make_batch, select
from farthing.parallel.cluster import ParallelModel
from farthing.parallel.plan import Layout
from tests.parallel.ranks import rank_options

pytest.importorskip("transformers")

from tests.parity.families import FAMILIES, build

LAYOUTS = [Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2)]


def greedy(model: DeepseekModel | ParallelModel, steps: int = 16) -> list[int]:
    """Tokens after a prompt long enough for sparse attention to choose."""
    step: Any = torch.arange(2, 32)
    cache, tokens, start = model.new_cache(8, 8, "float32"), [], 0
    with torch.inference_mode():
        for _ in range(steps):
            batch = make_batch([len(step)], [start], [list(range(8))], 8)
            hidden = model.forward(step, batch, cache)
            start += len(step)
            step = model.top_logits(hidden[-1:], 1)[1][0]
            tokens.append(int(step))
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp", "pp", "ep"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_give_the_tokens_of_one(name: str, layout: Layout, tmp_path: Path) -> None:
    build(name, 0, tmp_path)
    expected = greedy(load(tmp_path, select("reference", dtype=torch.float32)))
    model = ParallelModel(rank_options(tmp_path, layout))
    try:
        assert greedy(model) == expected
    finally:
        model.close()
