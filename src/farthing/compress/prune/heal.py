"""Retrain the remaining weights of a pruned layer with a few steps of gradient descent.

Student: the pruned feed-forward on the pruned model's hidden states. Teacher: the layer's output in the
unpruned model, so that training also compensates the error of earlier layers (block-wise reconstruction, as
in BRECQ, Li et al. 2021, and EBFT, Guo et al. 2024). Zeros stay zeros.

Legend: T calibration tokens; D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from farthing.compress.layer import Layer
from farthing.compress.trace import TracedOps
from farthing.model.moe import FeedForward, router_spec
from farthing.model.source import MemorySource

BATCH = 2048  # tokens per step
RATE = 0.01  # learning rate relative to a matrix's root mean square
WARMUP = 5


@dataclass(frozen=True, slots=True)
class Healed:
    """Squared error relative to the square of the layer's contribution, at the first and last steps."""

    before: float
    after: float


def heal(layer: Layer, masks: Mapping[str, Tensor], x: Tensor, target: Tensor, steps: int) -> Healed:
    """Train the masked matrices of the feed-forward of `layer`: x [T, D] -> target [T, D], with residual.

    Adam with a rate that decays to zero. Needs memory for four copies of the trained matrices. Replaces the
    masked matrices of `layer`; attention, router and norms do not change.
    """
    names = [m for m in masks if ".mlp." in m]
    if not names:
        raise ValueError("heal_steps needs a pruned feed-forward; none has a mask")
    parameters = {m: layer.weight(m).clone().requires_grad_() for m in names}
    groups = [
        {"params": [p], "lr": RATE * float(p.detach().square().mean().sqrt())} for p in parameters.values()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, steps))
    generator = torch.Generator().manual_seed(layer.index)
    norm = float((target - x).square().mean()) or 1.0
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            pick = torch.randperm(len(x), generator=generator)[:BATCH]
            loss = (_forward(layer, parameters, masks, x[pick]) - target[pick]).square().mean() / norm
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    for m in names:
        layer.set(m, parameters[m].detach() * masks[m])
    few = max(1, min(4, steps // 4))
    return Healed(sum(losses[:few]) / few, sum(losses[-few:]) / few)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _forward(layer: Layer, parameters: dict[str, Tensor], masks: Mapping[str, Tensor], x: Tensor) -> Tensor:
    changed = {f"{m}.weight": p * masks[m] for m, p in parameters.items()}
    source = MemorySource({**layer.tensors, **changed})
    router = router_spec(layer.config) if layer.is_moe else None
    return FeedForward(layer.config, TracedOps(), source, layer.index, router)(x)
