"""What a model needs of its feed-forward parameters, what each unit contributes, what a removal costs.

A model's information about a text is how much better it predicts the text's tokens than their frequencies
do, in nats per token and never less than zero. The neurons of every MLP are ordered by energy (`need.py`)
and cut into slices; a slice of routed experts takes neurons of every expert. The need of a slice is the
information lost when its neurons are silenced, less two standard errors over the text's windows, divided
by its share of the model's MLP parameters.

Noise passes other measures. Random weights are evenly active, so how often a neuron fires says nothing.
Silencing them also changes the loss, up or down by chance, but takes away no information: they predict worse
than frequencies do.

Shapes: B windows of T tokens; E experts (1 outside the routed ones), I neurons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing_lab.train.functional import Routing, plain_product
from farthing_lab.train.model import MLP, DeepSeekLM, MoE

# How much each neuron and each routed expert contributes over the tokens that reach it.
#
# The contribution of neuron j to a token is c_j = |h_j| * ||W_down[:, j]||: the length of the vector it
# adds to the output. The neuron is active on that token when c_j > tau times the token's mean
# contribution over the neurons of that MLP. A neuron is ranked by its energy, the sum of (w c_j)^2 over
# all tokens, where w is the routing weight (1 for a dense MLP or a shared expert). The energy of an
# expert is the sum over its neurons.
#
# Shapes: E experts (1 for a dense MLP or shared expert), I neurons, R rows.


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


# What a removal costs before training recovers: the rise of the loss without the units, measured on text.
#
# Shapes: B windows of T tokens, D hidden; E experts, I neurons.


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
