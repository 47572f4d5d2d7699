"""Every model type on two ranks (tensor, pipeline, expert parallelism): same tokens as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.model.decoder import DecoderModel
from farthing.model.load import load
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.parallel.cluster import ParallelModel
from farthing.parallel.plan import Layout
from tests.parallel.ranks import rank_options

pytest.importorskip("transformers")

from tests.parity.families import DENSE, FAMILIES, build

LAYOUTS = {
    "tp": Layout(2, 1, 1),
    "pp": Layout(1, 2, 1),
    "ep": Layout(1, 1, 2),
    "dp": Layout(1, 1, 2, dp_attention=True),
}


CASES = [
    (name, layout)
    for name in FAMILIES
    for layout in LAYOUTS
    if not (name in DENSE and layout in ("ep", "dp"))
]


# Seeds whose heads two ranks divide; 0 for other types.
SEEDS = {"qwen3_next": 1, "qwen3_5_moe": 6, "olmoe": 2}


def greedy(model: DecoderModel | ParallelModel, steps: int = 16) -> list[int]:
    """Greedy tokens after a prompt long enough for sparse attention."""
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
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_two_ranks_generate_the_tokens_of_one(name: str, layout: str, backend: str, tmp_path: Path) -> None:
    assert_same_tokens(name, LAYOUTS[layout], backend, tmp_path, SEEDS.get(name, 0))


@pytest.mark.parametrize("name", ["glm_moe_dsa", "longcat_flash"])
def test_two_expert_ranks_of_cpu_kernels_generate_the_tokens_of_one(name: str, tmp_path: Path) -> None:
    assert_same_tokens(name, LAYOUTS["ep"], "cpu", tmp_path)


@pytest.mark.parametrize(
    ("name", "layout", "seed"),
    [
        ("qwen3_moe", "tp", 2), ("llama", "tp", 3), ("smollm3", "pp", 0), ("granitemoe", "ep", 0),
        ("gpt_oss", "tp", 0), ("olmoe", "tp", 2), ("minimax_m2", "tp", 1), ("gemma4_text", "tp", 1),
    ],
)  # fmt: skip
def test_two_ranks_of_grouped_heads(name: str, layout: str, seed: int, tmp_path: Path) -> None:
    """Key-value heads are divided, or shared by ranks; biases are added once; layers keep their rotation;
    norms of all heads together are of those of both ranks."""
    assert_same_tokens(name, LAYOUTS[layout], "cpu", tmp_path, seed)


@pytest.mark.parametrize(
    ("name", "layout"), [("qwen3_next", "tp"), ("qwen3_5_moe", "tp"), ("qwen3_5_moe", "pp")]
)
def test_two_ranks_of_recurrent_layers(name: str, layout: str, tmp_path: Path) -> None:
    """The heads of a state are divided, whether projections are stored by head or by part."""
    assert_same_tokens(name, LAYOUTS[layout], "cpu", tmp_path, SEEDS[name])


def assert_same_tokens(name: str, layout: Layout, backend: str, path: Path, seed: int = 0) -> None:
    build(name, seed, path)
    expected = greedy(load(path, select(backend, dtype=torch.float32, threads=1)))
    model = ParallelModel(rank_options(path, layout, backend=backend))
    try:
        assert greedy(model) == expected
    finally:
        model.close()
