"""Calibrate adaptive experts: find how much gate weight each layer needs for a bounded loss of quality.

Each p of a grid is tried in each layer alone, measuring its loss and how many experts it still computes. A
knapsack picks one p per layer: the fewest expert evaluations within the loss budget. Losses of layers add up
only roughly, so the whole pick is measured, and the budget is cut until the upper end of the increase's
paired interval is within the requested bound. The bound then also holds on other text.
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

from farthing.compress.evaluate import Corpus, ratio_interval, window_losses
from farthing.compress.plan import knapsack
from farthing.files import replace_json
from farthing.model import AdaptiveExperts, DecoderModel, routers_of
from farthing.ops.specs import RouterSpec

GRID = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
BUDGET_STEPS = 400  # resolution of the knapsack
ATTEMPTS = 8
CONFIDENCE = 0.6  # two-sided: the bound holds on other text in four cases of five


@dataclass(frozen=True, slots=True)
class Option:
    """One p for one layer, tried alone."""

    mass: float
    loss: float  # nats per token above the loss with all experts
    experts: float  # mean experts per token in this layer


@dataclass(frozen=True, slots=True)
class AdaptivePlan:
    """The calibrated rule and its measured effect."""

    rule: AdaptiveExperts
    options: list[list[Option]]  # of every MoE layer, for the report
    perplexity_before: float
    perplexity_after: float
    most_drop: float  # upper end of the relative increase, 80 % one-sided
    experts_before: float
    experts_after: float  # mean per token and layer

    @property
    def drop(self) -> float:
        """Relative increase of perplexity."""
        return self.perplexity_after / self.perplexity_before - 1

    @property
    def flops_saved(self) -> float:
        """Share of the routed experts' FLOPs."""
        return 1 - self.experts_after / self.experts_before

    def to_json(self) -> dict[str, Any]:
        """As JSON-serializable values."""
        return asdict(self) | {"drop": self.drop, "flops_saved": self.flops_saved}


def calibrate_adaptive(
    model: DecoderModel,
    corpus: Corpus,
    max_drop: float,
    min_experts: int = 2,
    on_trial: Callable[[int, int], None] = lambda done, total: None,
) -> AdaptivePlan:
    """Choose a p for every layer so that perplexity rises by at most `max_drop` on text like `corpus`.

    Use text that the model was not trained on, because the loss on training text rises less. Restores the
    model's routing rule. Raises ValueError for a dense model.
    """
    specs = routers_of(model.config)
    moe = [i for i in range(model.config.num_hidden_layers) if specs[i] is not None]
    if not moe:
        raise ValueError("the model has no MoE layer; expected a mixture of experts")
    top_k = model.config.num_experts_per_tok
    trial = _Trial(model, corpus, specs, min_experts)
    try:
        options, done, total = [], 0, len(moe) * len(GRID)
        for layer in moe:
            row = []
            for p in GRID:
                tried = trial({layer: p})
                row.append(Option(p, max(tried.loss, 0.0), tried.experts[layer]))
                done += 1
                on_trial(done, total)
            options.append([*row, Option(1.0, 0.0, float(top_k))])
        masses, whole = _pick(trial, moe, options, max_drop)
    finally:
        model.reroute(specs)
    # The MTP layers follow the mean of the others: their loss is not the model's.
    mean = sum(masses.values()) / len(masses)
    rule = AdaptiveExperts(tuple(masses.get(i, mean) for i in range(len(specs))), min_experts, top_k)
    experts = sum(whole.experts[i] for i in moe) / len(moe)
    before = sum(trial.base) / corpus.tokens
    return AdaptivePlan(
        rule,
        options,
        math.exp(before),
        math.exp(before + whole.loss),
        math.expm1(whole.most),
        float(top_k),
        experts,
    )


def write_adaptive(source: Path, out: Path, plan: AdaptivePlan, model: DecoderModel) -> None:
    """Write `source` with the rule in its config.json; weight files are hard links if possible."""
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            _link(file, out / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    replace_json(out / "config.json", config | plan.rule.to_json(model.config), indent=2)


def fewest_experts(options: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """The option of each layer, minimizing the total experts with a total loss of at most `budget`.

    Every layer's last option costs nothing, so a choice always exists.
    """
    rows = [list(enumerate(row)) for row in options]
    chosen = knapsack(rows, lambda o: max(o[1].loss, 0.0), lambda o: o[1].experts, budget, BUDGET_STEPS)
    return [i for i, _ in chosen]


@dataclass(frozen=True, slots=True)
class _Tried:
    loss: float  # nats per token above the loss with all experts
    most: float  # upper end of its paired interval
    experts: list[float]  # mean per token, for every layer


class _Trial:
    """Measures rules on one text, each compared with all experts."""

    def __init__(
        self, model: DecoderModel, corpus: Corpus, specs: list[RouterSpec | None], min_experts: int
    ) -> None:
        self._model, self._corpus, self._specs, self._min = model, corpus, specs, min_experts
        model.reroute(specs)
        self.base = self._losses(None)

    def __call__(self, masses: dict[int, float]) -> _Tried:
        """Measure with the given layers routed by their p and the others unchanged."""
        self._model.reroute(
            [
                replace(s, mass=masses[i], min_experts=self._min) if s is not None and i in masses else s
                for i, s in enumerate(self._specs)
            ]
        )
        config = self._model.config
        counts = torch.zeros(self._model.cache_layers, config.router_size, dtype=torch.int64)
        losses = self._losses(counts)
        interval = ratio_interval(
            [after - before for after, before in zip(losses, self.base, strict=True)],
            [w.tokens for w in self._corpus.windows],
            CONFIDENCE,
        )
        return _Tried(interval.estimate, interval.high, (counts.sum(-1) / self._corpus.tokens).tolist())

    def _losses(self, counts: torch.Tensor | None) -> list[float]:
        with torch.inference_mode():
            return window_losses(self._model, self._corpus, counts=counts)


def _pick(
    trial: _Trial, moe: list[int], options: list[list[Option]], max_drop: float
) -> tuple[dict[int, float], _Tried]:
    """Bisect the knapsack's budget until the measured total is just within max_drop."""
    allowed = math.log1p(max_drop)
    low, high = 0.0, 2 * allowed
    best: tuple[dict[int, float], _Tried] | None = None
    seen: dict[tuple[int, ...], _Tried] = {}
    for _ in range(ATTEMPTS):
        budget = (low + high) / 2
        picks = tuple(fewest_experts(options, budget))
        masses = {layer: row[i].mass for layer, row, i in zip(moe, options, picks, strict=True)}
        if picks not in seen:
            seen[picks] = trial(masses)
        if seen[picks].most <= allowed:
            low, best = budget, (masses, seen[picks])
        else:
            high = budget
    if best is None:
        masses = dict.fromkeys(moe, 1.0)
        best = (masses, trial(masses))
    return best


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
