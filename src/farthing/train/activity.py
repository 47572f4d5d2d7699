"""How much each neuron and each routed expert contributes over the tokens that reach it.

The contribution of neuron j to a token is c_j = |h_j| * ||W_down[:, j]||: the length of the vector it adds to
the output. The neuron is active on that token when c_j > tau times the token's mean contribution over the
neurons of that MLP. A neuron is ranked by its energy, the sum of (w c_j)^2 over all tokens, where w is the
routing weight (1 for a dense MLP or a shared expert). The energy of an expert is the sum over its neurons.

Shapes: E experts (1 for a dense MLP or shared expert), I neurons, R rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from farthing.train.grouped import Routing, plain_product
from farthing.train.model import MLP, DeepSeekLM, MoE


@dataclasses.dataclass
class Activity:
    """Per-neuron sums over tokens, for one MLP or one layer's routed experts."""

    tau: float
    tokens: Tensor  # [E]
    active: Tensor  # [E, I] tokens on which a neuron was active
    energy: Tensor  # [E, I] sum of (routing weight * c_j) squared

    @classmethod
    def empty(cls, experts: int, width: int, tau: float) -> Activity:
        """All sums zero."""
        zeros = torch.zeros(experts, width)
        return cls(tau, torch.zeros(experts), zeros, zeros.clone())

    def add(self, contribution: Tensor, expert: Tensor, weight: Tensor) -> None:
        """Add rows with contributions c [R, I] (float32), experts [R] and routing weights [R].

        The sums stay on their first device, whatever device the model is on.
        """
        contribution, expert, weight = (x.to(self.tokens.device) for x in (contribution, expert, weight))
        mean = contribution.mean(-1, keepdim=True)
        for total, value in (
            (self.tokens, torch.ones_like(weight)),
            (self.active, (contribution > self.tau * mean).float()),
            (self.energy, (weight[:, None] * contribution).square_()),
        ):
            total.index_add_(0, expert, value)

    def keep_neurons(self, keep: Tensor) -> None:
        """Keep only the neurons `keep` [E, I']."""
        self.active, self.energy = self.active.gather(1, keep), self.energy.gather(1, keep)

    def keep_experts(self, keep: Tensor) -> None:
        """Keep only the experts `keep` [E']."""
        self.tokens, self.active, self.energy = self.tokens[keep], self.active[keep], self.energy[keep]

    @property
    def active_share(self) -> Tensor:
        """[E, I] share of its tokens on which each neuron is active; 0 if it had no tokens."""
        return self.active / self.tokens.clamp_min(1)[:, None]

    def busy(self, share: float = 0.5) -> float:
        """Share of neurons that are active on at least `share` of the tokens routed to them."""
        return float((self.active_share >= share).float().mean())


def mlps(model: DeepSeekLM) -> Iterator[tuple[str, MLP | MoE]]:
    """(name, module) of every MLP and MoE; a MoE means its routed experts."""
    for name, module in model.named_modules():
        if isinstance(module, MLP | MoE):
            yield name, module


@contextmanager
def watch(model: DeepSeekLM, tau: float) -> Iterator[dict[str, Activity]]:
    """Inside the context, every forward pass adds to the yielded activities."""
    found: dict[str, Activity] = {}
    closed = []
    for name, module in mlps(model):
        assert module.tap is None, "activities are already being watched"
        if isinstance(module, MoE):
            found[name] = Activity.empty(len(module.down), module.down.shape[2], tau)
            if module.products is None:
                module.products = (plain_product, plain_product)
                closed.append(module)
        else:
            found[name] = Activity.empty(1, module.down_proj.weight.shape[1], tau)
        module.tap = _tap(module, found[name])
    try:
        yield found
    finally:
        for _, module in mlps(model):
            module.tap = None
        for module in closed:
            module.products = None


def _tap(module: MLP | MoE, activity: Activity) -> Any:
    @torch.no_grad()
    def routed(hidden: Tensor, routing: Routing, weights: Tensor) -> None:
        assert isinstance(module, MoE)
        w = hidden.new_zeros(len(routing.token), dtype=torch.float32)
        w[routing.row.flatten()] = weights.detach().float().flatten()
        expert = routing.expert[routing.real]
        lengths = module.down.detach().norm(dim=1)[expert]  # [R, I]
        activity.add(hidden.detach()[routing.real].abs().float() * lengths, expert, w[routing.real])

    @torch.no_grad()
    def plain(hidden: Tensor) -> None:
        assert isinstance(module, MLP)
        rows = hidden.detach().flatten(0, -2).abs().float() * module.down_proj.weight.detach().norm(dim=0)
        activity.add(rows, torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows)))

    return routed if isinstance(module, MoE) else plain


@torch.no_grad()
def measure(model: DeepSeekLM, tokens: Tensor, tau: float) -> dict[str, Activity]:
    """Activities over tokens [B, T + 1], including the MTP layer's."""
    tokens = tokens.to(model.embed_tokens.device)
    training = model.training
    model.eval()
    with watch(model, tau) as found:
        hidden = model(tokens[:, :-1])
        if model.mtp is not None:
            model.draft(hidden[:, :-1], tokens[:, 1:-1])
    model.train(training)
    return found


def busy_share(activities: dict[str, Activity], share: float = 0.5) -> float:
    """Share of the model's neurons that are active on at least `share` of their tokens."""
    counts = [(a.active_share >= share).float().sum() for a in activities.values()]
    return float(sum(counts) / sum(a.active.numel() for a in activities.values()))


def share_deciles(activities: dict[str, Activity]) -> list[float]:
    """Deciles (10 %, 20 %, … 90 %) over all neurons of the share of tokens on which each is active."""
    shares = torch.cat([a.active_share.flatten() for a in activities.values()])
    return [float(q) for q in shares.quantile(torch.linspace(0.1, 0.9, 9))]
