"""Calibrate adaptive experts: how much gate weight each layer needs, for a bounded loss of quality.

Each layer alone is tried with each p of a grid: what it costs in loss, and how many experts it still
computes. A knapsack picks one p a layer, the fewest expert evaluations within the loss budget; losses of
layers add up only roughly, so the pick is measured whole and the budget is cut until it holds.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from farthing.compress.corpus import Corpus, batches
from farthing.compress.evaluate import evaluate, paged_batch
from farthing.model import DeepseekModel
from farthing.model.deepseek import routers_of
from farthing.model.experts import AdaptiveExperts
from farthing.ops import RouterSpec

GRID = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
BUDGET_STEPS = 400  # resolution of the knapsack
ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Option:
    """One p for one layer, tried alone."""

    mass: float
    loss: float  # nats a token above all experts
    experts: float  # mean experts a token in this layer


@dataclass(frozen=True, slots=True)
class AdaptivePlan:
    """The calibrated rule and what it was measured to do."""

    rule: AdaptiveExperts
    options: list[list[Option]]  # of every MoE layer, for the report
    perplexity_before: float
    perplexity_after: float
    experts_before: float
    experts_after: float  # mean a token a layer

    @property
    def drop(self) -> float:
        """Relative increase of perplexity."""
        return self.perplexity_after / self.perplexity_before - 1

    @property
    def flops_saved(self) -> float:
        """Share of the routed experts' FLOPs."""
        return 1 - self.experts_after / self.experts_before

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"drop": self.drop, "flops_saved": self.flops_saved}


def calibrate_adaptive(
    model: DeepseekModel,
    corpus: Corpus,
    max_drop: float,
    min_experts: int = 2,
    on_trial: Callable[[int, int], None] = lambda done, total: None,
) -> AdaptivePlan:
    """A p for every layer so that perplexity on `corpus` rises by at most `max_drop`.

    The model's routing rule is left as it was found. Raises ValueError for a dense model.
    """
    specs = routers_of(model.config)
    moe = [i for i in range(model.config.num_hidden_layers) if specs[i] is not None]
    if not moe:
        raise ValueError("the model has no MoE layer; expected a mixture of experts")
    top_k = model.config.num_experts_per_tok
    try:
        base, _ = _measure(model, corpus, specs)
        options, done, total = [], 0, len(moe) * len(GRID)
        for layer in moe:
            row = []
            for p in GRID:
                loss, used = _measure(model, corpus, _with(specs, {layer: p}, min_experts))
                row.append(Option(p, max(loss - base, 0.0), used[layer]))
                done += 1
                on_trial(done, total)
            options.append([*row, Option(1.0, 0.0, float(top_k))])
        masses, loss, used = _pick(model, corpus, specs, moe, options, base, max_drop, min_experts)
    finally:
        model.reroute(specs)
    # The MTP layers follow the mean of the others: their loss is not the model's.
    mean = sum(masses.values()) / len(masses)
    rule = AdaptiveExperts(tuple(masses.get(i, mean) for i in range(len(specs))), min_experts, top_k)
    experts = sum(used[i] for i in moe) / len(moe)
    return AdaptivePlan(rule, options, math.exp(base), math.exp(loss), float(top_k), experts)


def write_adaptive(source: Path, out: Path, plan: AdaptivePlan, model: DeepseekModel) -> None:
    """`source` with the rule in its config.json; weight files are hard links where the disk allows."""
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            _link(file, out / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | plan.rule.to_json(model.config), indent=2)
    (out / "config.json").write_text(text, encoding="utf-8")


def knapsack(options: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """The option of each layer with the fewest experts in all and losses of at most `budget` in sum.

    Every layer's last option costs nothing, so a choice always exists.
    """
    unit = budget / BUDGET_STEPS
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # units of loss spent -> (experts, picks)
    for row in options:
        reached: dict[int, tuple[float, list[int]]] = {}
        for spent, (experts, picks) in best.items():
            for i, option in enumerate(row):
                units = spent + (math.ceil(option.loss / unit) if option.loss > 0 else 0)
                if units <= BUDGET_STEPS:
                    candidate = experts + option.experts
                    if units not in reached or candidate < reached[units][0]:
                        reached[units] = (candidate, [*picks, i])
        best = _undominated(reached)
    return min(best.values())[1]


def _undominated(reached: dict[int, tuple[float, list[int]]]) -> dict[int, tuple[float, list[int]]]:
    """Drop what another choice beats in both loss and experts."""
    kept, fewest = {}, math.inf
    for spent in sorted(reached):
        if reached[spent][0] < fewest:
            kept[spent] = reached[spent]
            fewest = reached[spent][0]
    return kept


def _pick(
    model: DeepseekModel,
    corpus: Corpus,
    specs: list[RouterSpec | None],
    moe: list[int],
    options: list[list[Option]],
    base: float,
    max_drop: float,
    min_experts: int,
) -> tuple[dict[int, float], float, list[float]]:
    """Bisect the knapsack's budget until the whole, measured, is just within max_drop."""
    allowed = math.log1p(max_drop)
    low, high = 0.0, 2 * allowed
    found: tuple[dict[int, float], float, list[float]] | None = None
    for _ in range(ATTEMPTS):
        budget = (low + high) / 2
        picks = knapsack(options, budget)
        masses = {layer: row[i].mass for layer, row, i in zip(moe, options, picks, strict=True)}
        loss, used = _measure(model, corpus, _with(specs, masses, min_experts))
        if loss - base <= allowed:
            low, found = budget, (masses, loss, used)
        else:
            high = budget
    if found is None:
        masses = dict.fromkeys(moe, 1.0)
        loss, used = _measure(model, corpus, _with(specs, masses, min_experts))
        found = (masses, loss, used)
    return found


def _with(
    specs: list[RouterSpec | None], masses: dict[int, float], min_experts: int
) -> list[RouterSpec | None]:
    return [
        replace(s, mass=masses[i], min_experts=min_experts) if s is not None and i in masses else s
        for i, s in enumerate(specs)
    ]


def _measure(
    model: DeepseekModel, corpus: Corpus, routers: list[RouterSpec | None]
) -> tuple[float, list[float]]:
    """(nats a token, mean experts a token of every layer) under a routing rule."""
    model.reroute(routers)
    loss = math.log(evaluate(model, corpus, with_drafts=False).perplexity)
    counts = torch.zeros(model.cache_layers, model.config.n_routed_experts or 0, dtype=torch.int64)
    group = next(batches(corpus.windows, 4096))
    batch, blocks = paged_batch([w.tokens for w in group])
    with torch.inference_mode():
        model.forward(torch.cat([w.ids[:-1] for w in group]), batch, model.new_cache(blocks), counts)
    return loss, (counts.sum(-1) / sum(w.tokens for w in group)).tolist()


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
