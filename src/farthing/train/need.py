"""The share of a model's feed-forward parameters that its predictions need.

The neurons of every MLP are ordered by energy (`activity.py`) and cut into slices; a slice of routed experts
takes neurons of every expert. The need of a slice is the rise of the loss on text when its neurons are
silenced, divided by its share of the model's MLP parameters. How often a neuron fires says nothing about
this: random weights are evenly active, but silencing any of them leaves a random prediction equally bad.

Shapes: B windows of T tokens; E experts (1 outside the routed ones), I neurons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.train.activity import measure, mlps
from farthing.train.model import MLP, DeepSeekLM, MoE

SLICES = 8  # of every MLP
LEAST = 16  # minimum neurons per slice
TYPICAL = 0.7  # share of the unpruned model's MLP parameters whose need is above the threshold


@dataclasses.dataclass(frozen=True)
class Slice:
    """Neurons of one MLP that are silenced together."""

    name: str
    parameters: int
    rise: float  # rise of the loss without them, nats per token
    need: float  # rise / (share of the model's MLP parameters)


@torch.no_grad()
def needs(model: DeepSeekLM, tokens: Tensor) -> list[Slice]:
    """Measure every slice of the model on tokens [B, T + 1], except the MTP layers, which only draft."""
    tokens = tokens.to(model.embed_tokens.device)
    training = model.training
    model.eval()
    activities = measure(model, tokens, tau=0.3)
    modules = [(name, module) for name, module in mlps(model) if not name.startswith("mtp.")]
    total = sum(_parameters(module, _down(module).shape[2]) for _, module in modules)
    base = _loss(model, tokens)
    found = []
    for name, module in modules:
        order = activities[name].energy.argsort(dim=1)  # [E, I], least first
        for part in order.split(max(LEAST, -(-order.shape[1] // SLICES)), dim=1):
            with _silent(module, part):
                rise = _loss(model, tokens) - base
            size = _parameters(module, part.shape[1])
            found.append(Slice(name, size, rise, rise / (size / total)))
    model.train(training)
    return found


def threshold(slices: Sequence[Slice], share: float = TYPICAL) -> float:
    """The need reached by at most `share` of the parameters in `slices`; chosen on the unpruned model."""
    total, above = sum(s.parameters for s in slices), 0
    ordered = sorted(slices, key=lambda s: -s.need)
    for s in ordered:
        above += s.parameters
        if above > share * total:
            return s.need + 1e-12
    return ordered[-1].need


def needed_share(slices: Sequence[Slice], least: float) -> float:
    """Share of the MLP parameters in slices whose need is at least `least`."""
    return sum(s.parameters for s in slices if s.need >= least) / sum(s.parameters for s in slices)


def _down(module: MLP | MoE) -> Tensor:
    """[E, D, I]"""
    return module.down if isinstance(module, MoE) else module.down_proj.weight[None]


def _parameters(module: MLP | MoE, neurons: int) -> int:
    experts, hidden, _ = _down(module).shape
    return 3 * experts * hidden * neurons


@contextmanager
def _silent(module: MLP | MoE, neurons: Tensor) -> Iterator[None]:
    """Inside the context, neurons [E, n] contribute nothing."""
    down = _down(module)
    index = neurons.to(down.device)[:, None].expand(-1, down.shape[1], -1)
    kept = down.gather(2, index).clone()
    down.scatter_(2, index, 0.0)
    try:
        yield
    finally:
        down.scatter_(2, index, kept)


def _loss(model: DeepSeekLM, tokens: Tensor) -> float:
    """Next-token loss in nats per token, float64 mean over windows."""
    total = 0.0
    for row in tokens.split(2):
        logits = model.logits(model(row[:, :-1])).float()
        total += float(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"))
    return total / tokens[:, 1:].numel()


@torch.no_grad()
def random_twin(model: DeepSeekLM, seed: int = 0) -> DeepSeekLM:
    """A null model of the same sizes whose matrices are noise of unit gain."""
    twin = DeepSeekLM(model.cfg).to(model.embed_tokens.device)
    generator = torch.Generator().manual_seed(seed)
    for p in twin.parameters():
        if p.ndim > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return twin
