"""Sparse attention for training (DeepSeek-V3.2-Exp section 2.1): scores, selection, and the indexer's loss
against attention.

Shapes: B sequences, T positions, H heads, J index heads, d index head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pick = Callable[
    [Tensor, int], Tensor
]  # (causal scores [B, T, T], k) -> the keys of each query, bool [B, T, T]
NONE = float("-inf")


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """sum_j w_j ReLU(q_j . k) d^-1/2, minus infinity for keys after the query: q [B, T, J, d], k [B, T, d],
    w [B, T, J] -> [B, T, T] float32.
    """
    w = w.float() * q.shape[-1] ** -0.5
    scores = q.new_zeros(q.shape[0], q.shape[1], q.shape[1], dtype=torch.float32)
    for j in range(q.shape[2]):
        scores = scores + w[..., j, None] * (q[:, :, j] @ k.mT).relu().float()
    return scores.masked_fill(~causal(scores), NONE)


def causal(scores: Tensor) -> Tensor:
    """Bool [T, T]: the keys up to and including each query."""
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return ones.tril()


def largest(scores: Tensor, k: int) -> Tensor:
    """The k keys with the largest scores, or all of them if there are fewer."""
    k = min(k, scores.shape[-1])
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(
        -1, scores.topk(k, sorted=False).indices, True
    )
    return chosen & causal(scores)


def recent(scores: Tensor, k: int) -> Tensor:
    """The last k keys, ignoring scores: a control."""
    return (causal(scores) & ~causal(scores).tril(-k)).expand_as(scores)


def random_keys(scores: Tensor, k: int) -> Tensor:
    """k random keys, including the query's own: a control."""
    noise = torch.rand_like(scores).masked_fill(~causal(scores), NONE)
    return largest(noise.diagonal_scatter(torch.full(scores.shape[:-1], 2.0), dim1=-2, dim2=-1), k)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the selected keys: q, k [B, H, T, d], v [B, H, T, dv], keys [B, T, T] ->
    (out [B, H, T, dv], mean distribution of the heads [B, T, T] float32, without gradient).
    """
    scores = (q @ k.mT).mul(scale).masked_fill(~keys[:, None], NONE)
    probs = scores.softmax(-1)
    return probs @ v, probs.detach().mean(1, dtype=torch.float32)


def divergence(target: Tensor, scores: Tensor, keys: Tensor) -> Tensor:
    """Mean KL(target || softmax of the scores over the selected keys), in nats per query."""
    log_q = scores.masked_fill(~keys, NONE).log_softmax(-1).masked_fill(~keys, 0.0)
    own: Tensor = torch.special.xlogy(target, target)
    return (own - target * log_q).sum(-1).mean()
