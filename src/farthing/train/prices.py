"""What a removal costs before training recovers: the rise of the loss without the units, measured on text.

Shapes: B windows of T tokens, D hidden; E experts, I neurons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.train.model import MLP, DeepSeekLM, MoE
from farthing.train.need import PART, nats, silent


@dataclasses.dataclass(frozen=True)
class Cut:
    """One removal: the neurons [E, I'] or experts [E'] of a module to keep, ascending."""

    name: str
    kind: Literal["neurons", "experts"]
    keep: Tensor
    cost: float  # share of the layer's MLP energy removed, or the rise of the loss in nats per token
    parameters: int


@torch.no_grad()
def prices(model: DeepSeekLM, cuts: Sequence[Cut], tokens: Tensor, mtp_weight: float) -> list[float]:
    """The rise of the loss on tokens [B, T + 1] without each of the cuts, nats per token.

    The loss is that of the next token; of cuts in the MTP layer, `mtp_weight` times that of its drafts.
    `cuts` are in the order of the layers.
    """
    if not cuts:
        return []
    training = model.training
    model.eval()
    tokens = tokens.to(model.embed_tokens.device)
    entering, layer = F.embedding(tokens[:, :-1], model.embed_tokens), 0
    base = float(nats(model, tokens).mean())
    drafts = _draft_nats(model, tokens, model.finish(entering)) if _drafts(cuts) else 0.0
    found = []
    for cut in cuts:
        target = len(model.layers) if cut.name.startswith("mtp.") else int(cut.name.split(".")[1])
        while layer < target:
            turn = model.turn[: entering.shape[1]]
            entering = torch.cat([model.layers[layer](rows, turn) for rows in entering.split(PART)])
            layer += 1
        with without(model, cut):
            if cut.name.startswith("mtp."):
                without_it = _draft_nats(model, tokens, model.finish(entering, layer))
                found.append(mtp_weight * (without_it - drafts))
            else:
                found.append(float(nats(model, tokens, entering, layer).mean()) - base)
    model.train(training)
    return found


def _drafts(cuts: Sequence[Cut]) -> bool:
    return any(cut.name.startswith("mtp.") for cut in cuts)


def _draft_nats(model: DeepSeekLM, tokens: Tensor, hidden: Tensor) -> float:
    """Loss of the drafted tokens of tokens [B, T + 1], given the trunk's hidden [B, T, D]."""
    total = 0.0
    for rows, h in zip(tokens.split(PART), hidden.split(PART), strict=True):
        guess = model.logits(model.draft(h[:, :-1], rows[:, 1:-1])).float()
        total += float(F.cross_entropy(guess.flatten(0, 1), rows[:, 2:].flatten())) * len(rows)
    return total / len(tokens)


@contextmanager
def without(model: DeepSeekLM, cut: Cut) -> Iterator[None]:
    """Inside the context, the model computes as after the cut, with tensors of the same sizes."""
    module = model.get_submodule(cut.name)
    assert isinstance(module, MLP | MoE)
    if cut.kind == "neurons":
        width = (module.down if isinstance(module, MoE) else module.down_proj.weight).shape[-1]
        with silent(module, _others(cut.keep, width)):
            yield
        return
    assert isinstance(module, MoE)
    bias = module.gate.e_score_correction_bias
    kept = bias.clone()
    bias[_others(cut.keep, len(bias))] = -1e9  # never selected
    try:
        yield
    finally:
        bias.copy_(kept)


def _others(keep: Tensor, count: int) -> Tensor:
    """The indices below `count` that are not in each row of `keep` [..., K], ascending: [..., count - K]."""
    gone = torch.ones(*keep.shape[:-1], count, dtype=torch.bool).scatter_(-1, keep.cpu(), False)
    return gone.nonzero()[:, -1].view(*keep.shape[:-1], -1)
