"""The share of a model's feed-forward parameters that its predictions need.

A model's information about a text is how much better it predicts the text's tokens than their frequencies do,
in nats per token and never less than zero. The neurons of every MLP are ordered by energy (`activity.py`) and
cut into slices; a slice of routed experts takes neurons of every expert. The need of a slice is the
information lost when its neurons are silenced, less two standard errors over the text's windows, divided by
its share of the model's MLP parameters.

Noise passes other measures. Random weights are evenly active, so how often a neuron fires says nothing.
Silencing them also changes the loss, up or down by chance, but takes away no information: they predict worse
than frequencies do.

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
PART = 2  # windows per forward pass
CERTAIN = 2.0  # standard errors by which a loss of information must exceed zero
TYPICAL = 0.7  # share of the unpruned model's MLP parameters whose need is above the threshold


@dataclasses.dataclass(frozen=True)
class Slice:
    """Neurons of one MLP that are silenced together."""

    name: str
    parameters: int
    lost: float  # information lost without them, nats per token
    error: float  # its standard error over windows
    share: float  # of the model's MLP parameters

    @property
    def need(self) -> float:
        """The proven loss per share of the parameters; negative if none is proven."""
        return (self.lost - CERTAIN * self.error) / self.share


@torch.no_grad()
def needs(model: DeepSeekLM, tokens: Tensor) -> list[Slice]:
    """Measure every slice of the model on tokens [B, T + 1], except the MTP layers, which only draft.

    Raises ValueError for fewer than two windows, which have no standard error.
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens: got {len(tokens)} window; expected at least 2 to estimate errors")
    tokens = tokens.to(model.embed_tokens.device)
    training = model.training
    model.eval()
    activities = measure(model, tokens, tau=0.3)
    modules = [(name, module) for name, module in mlps(model) if not name.startswith("mtp.")]
    total = sum(_parameters(module, _down(module).shape[2]) for _, module in modules)
    entering = F.embedding(tokens[:, :-1], model.embed_tokens)
    base = information(model, tokens)
    found = []
    for i, layer in enumerate(model.layers):
        for name, module in modules:
            if not name.startswith(f"layers.{i}."):
                continue
            order = activities[name].energy.argsort(dim=1)  # [E, I], least first
            for part in order.split(max(LEAST, -(-order.shape[1] // SLICES)), dim=1):
                lost = torch.zeros_like(base)
                if base.any():  # else there is nothing to lose
                    with silent(module, part):
                        lost = base - information(model, tokens, entering, i)
                error = float(lost.std()) * len(lost) ** -0.5
                size = _parameters(module, part.shape[1])
                found.append(Slice(name, size, float(lost.mean()), error, size / total))
        entering = torch.cat([layer(rows, model.turn[: rows.shape[1]]) for rows in entering.split(PART)])
    model.train(training)
    return found


def threshold(slices: Sequence[Slice], share: float = TYPICAL) -> float:
    """The need above zero reached by at most `share` of the parameters in `slices`; chosen on the unpruned
    model.
    """
    total, above = sum(s.parameters for s in slices), 0
    ordered = sorted(slices, key=lambda s: -s.need)
    for s in ordered:
        above += s.parameters
        if above > share * total:
            return max(s.need, 0.0) + 1e-12
    return max(ordered[-1].need, 1e-12)


def needed_share(slices: Sequence[Slice], least: float) -> float:
    """Share of the MLP parameters in slices whose need is at least `least`."""
    return sum(s.parameters for s in slices if s.need >= least) / sum(s.parameters for s in slices)


def need_deciles(slices: Sequence[Slice]) -> list[float]:
    """Needs that 10 %, 20 %, … 90 % of the MLP parameters do not exceed."""
    ordered, below = sorted(slices, key=lambda s: s.need), 0.0
    tenths = [i / 10 for i in range(1, 10)]
    found: list[float] = []
    for s in ordered:
        below += s.share
        found += [s.need] * sum(t <= below + 1e-9 for t in tenths[len(found) :])
    return found


def _down(module: MLP | MoE) -> Tensor:
    """[E, D, I]"""
    return module.down if isinstance(module, MoE) else module.down_proj.weight[None]


def _parameters(module: MLP | MoE, neurons: int) -> int:
    experts, hidden, _ = _down(module).shape
    return 3 * experts * hidden * neurons


@contextmanager
def silent(module: MLP | MoE, neurons: Tensor) -> Iterator[None]:
    """Inside the context, neurons [E, n] contribute nothing."""
    down = _down(module)
    index = neurons.to(down.device)[:, None].expand(-1, down.shape[1], -1)
    kept = down.gather(2, index).clone()
    down.scatter_(2, index, 0.0)
    try:
        yield
    finally:
        down.scatter_(2, index, kept)


@torch.no_grad()
def information(model: DeepSeekLM, tokens: Tensor, entering: Tensor | None = None, first: int = 0) -> Tensor:
    """Of every window of tokens [B, T + 1]: nats per token, float64 [B]. Other arguments: see `nats`."""
    counts = tokens[:, 1:].flatten().bincount().double()
    frequencies = counts / counts.sum()
    chance = -float(frequencies.xlogy(frequencies).sum())  # their entropy
    return (chance - nats(model, tokens, entering, first)).clamp_min(0)


@torch.no_grad()
def nats(model: DeepSeekLM, tokens: Tensor, entering: Tensor | None = None, first: int = 0) -> Tensor:
    """The loss of every window of tokens [B, T + 1] in nats per token, float64 [B].

    `entering` [B, T, D] is the input of layer `first`, if known; the layers before it are then not computed.
    """
    if entering is None:
        entering, first = F.embedding(tokens[:, :-1], model.embed_tokens), 0
    found = []
    for rows, h in zip(tokens.split(PART), entering.split(PART), strict=True):
        logits = model.logits(model.finish(h, first)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        found.append(loss.view(len(rows), -1).double().mean(1).cpu())
    return torch.cat(found)


@torch.no_grad()
def random_twin(model: DeepSeekLM, seed: int = 0) -> DeepSeekLM:
    """A null model of the same sizes whose matrices are noise of unit gain."""
    twin = DeepSeekLM(model.cfg).to(model.embed_tokens.device)
    generator = torch.Generator().manual_seed(seed)
    for p in twin.parameters():
        if p.ndim > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return twin
