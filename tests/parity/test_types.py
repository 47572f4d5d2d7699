"""Every model type against transformers: logits over the paged cache, and greedy tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.model import DeepseekModel, load
from farthing.ops import Ops, make_batch, select

pytest.importorskip("transformers")

from .families import FAMILIES, build

SEEDS = range(8)
BLOCK = 4
LENGTH = 21
STEPS = 64


def ops_of(backend: str) -> Ops:
    return select(backend, dtype=torch.float32, threads=None if backend == "reference" else 2)


def run(model: DeepseekModel, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits [T, V] of a prompt that enters the paged cache in chunks, over scattered blocks."""
    blocks = (len(ids) + BLOCK - 1) // BLOCK
    table = torch.randperm(blocks + 3)[:blocks].tolist()
    cache = model.new_cache(blocks + 3, BLOCK, "float32")
    out, start = [], 0
    for size in chunks:
        batch = make_batch([size], [start], [table], BLOCK)
        out.append(model.logits(model.forward(ids[start : start + size], batch, cache)))
        start += size
    return torch.cat(out)


def greedy(model: DeepseekModel, ids: torch.Tensor, steps: int) -> list[int]:
    blocks = (len(ids) + steps) // BLOCK + 1
    table, cache = list(range(blocks)), model.new_cache(blocks, BLOCK, "float32")
    tokens, start, step = [], 0, ids
    for _ in range(steps):
        hidden = model.forward(step, make_batch([len(step)], [start], [table], BLOCK), cache)
        start += len(step)
        step = model.top_logits(hidden[-1:], 1)[1][:, 0]
        tokens.append(int(step))
    return tokens


def theirs_greedy(model: Any, ids: torch.Tensor, steps: int) -> list[int]:
    tokens: list[int] = []
    seen = ids[None]
    for _ in range(steps):
        seen = torch.cat((seen, model(input_ids=seen).logits[:, -1:].argmax(-1)), -1)
        tokens.append(int(seen[0, -1]))
    return tokens


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens(name: str, seed: int, tmp_path: Path) -> None:
    theirs = build(name, seed, tmp_path)
    rng = random.Random(seed)
    chunkings = {"prefill": [LENGTH], "decode": [1] * LENGTH, "random": []}
    while sum(chunkings["random"]) < LENGTH:
        chunkings["random"].append(rng.randint(1, min(7, LENGTH - sum(chunkings["random"]))))
    with torch.inference_mode():
        for backend in ("reference", "cpu"):
            ours = load(tmp_path, ops_of(backend))
            ids = torch.randint(2, ours.config.vocab_size, (LENGTH,), generator=torch.manual_seed(seed))
            expected = theirs(input_ids=ids[None]).logits[0]
            scale = expected.abs().max()
            for way, chunks in chunkings.items():
                error = (run(ours, ids, chunks) - expected).abs().max() / scale
                assert error < 1e-4, f"{backend}, {way}: relative error {error:.2e}"
            assert greedy(ours, ids, STEPS) == theirs_greedy(theirs, ids, STEPS), backend
