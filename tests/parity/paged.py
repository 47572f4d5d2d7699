"""Our model over a paged cache: a prompt in chunks, and greedy tokens."""

from __future__ import annotations

import random
from math import lcm

import torch

from farthing.model.decoder import DecoderModel
from farthing.ops.api import CacheDtype
from farthing.ops.torch_util import make_batch

BLOCK = 4


def chunkings(length: int, rng: random.Random) -> dict[str, list[int]]:
    """Ways to feed a prompt: at once, token by token, and in random chunks."""
    random_chunks: list[int] = []
    while sum(random_chunks) < length:
        random_chunks.append(rng.randint(1, min(7, length - sum(random_chunks))))
    return {"prefill": [length], "decode": [1] * length, "random": random_chunks}


def run(
    model: DecoderModel,
    ids: torch.Tensor,
    chunks: list[int],
    dtype: CacheDtype = "float32",
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [T, V] of a prompt that enters the paged cache in chunks, over scattered blocks.

    beside: a longer sequence of which each step has one token too, before the prompt's.
    """
    size = lcm(BLOCK, model.config.block_tokens)
    others = 0 if beside is None else 1
    blocks = (max(len(ids), others and len(chunks)) + size - 1) // size
    scattered = torch.randperm(2 * blocks + 3).tolist()
    tables = [scattered[:blocks], scattered[blocks : 2 * blocks]][1 - others :]
    cache = model.new_cache(2 * blocks + 3, size, dtype)
    out, start = [], 0
    for step, count in enumerate(chunks):
        batch = make_batch([*[1] * others, count], [*[step] * others, start], tables, size)
        tokens = ids[start : start + count]
        if beside is not None:
            tokens = torch.cat((beside[step : step + 1], tokens))
        out.append(model.logits(model.forward(tokens, batch, cache))[others:])
        start += count
    return torch.cat(out)


def continues_greedily(logits: torch.Tensor, length: int, tokens: list[int]) -> bool:
    """Whether `tokens` are the likeliest ones after the first `length`; logits [T, V] of all but the last.

    By induction, a model with these logits generates them: each is its choice after those before it.
    """
    return logits[length - 1 :].argmax(-1).tolist() == tokens


def greedy(model: DecoderModel, ids: torch.Tensor, steps: int) -> list[int]:
    """The `steps` most likely tokens after a prompt."""
    size = lcm(BLOCK, model.config.block_tokens)
    blocks = (len(ids) + steps) // size + 1
    table, cache = list(range(blocks)), model.new_cache(blocks, size, "float32")
    tokens, start, step = [], 0, ids
    for _ in range(steps):
        hidden = model.forward(step, make_batch([len(step)], [start], [table], size), cache)
        start += len(step)
        step = model.top_logits(hidden[-1:], 1)[1][:, 0]
        tokens.append(int(step))
    return tokens
