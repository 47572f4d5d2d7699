"""The automatic plan: how few bits, and how many zero blocks, each part of the model can stand.

The damage of giving one part one format is measured (`sensitivity.py`). For small changes damages add up
(Taylor), and for a model that fits its data the mean KL is what log-perplexity rises by. So the best plan for
a budget is a knapsack: per part one option (bytes, KL), least KL within the bytes or fewest bytes within the
KL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farthing.checkpoint import Checkpoint
from farthing.compress.corpus import Corpus
from farthing.compress.recipe import Prune, Recipe
from farthing.compress.sensitivity import Option, measure, part_of
from farthing.compress.stream import Progress
from farthing.model import ModelConfig

CELLS = 2000  # resolution of the knapsack's budget
SPENT = 0.6  # of max_drop: what is left is for the gate's interval, which has to fit as well
HEAL_STEPS = 120  # of a layer whose feed-forward gets zero blocks


@dataclass(frozen=True, slots=True)
class PlanResult:
    """One option a part, and why."""

    chosen: dict[str, Option]  # by part
    options: list[Option]
    explanation: str
    layers: int  # those behind are MTP layers

    def format(self, module: str) -> str:
        """The plan in the form `stream.Job` wants.

        MTP layers only draft: a wrong draft costs time and never accuracy. So they are not measured and
        follow the last layer; what that has no counterpart of gets 8 bits.
        """
        pieces = module.split(".")
        index = min(int(pieces[2]), self.layers - 1)
        twin = ".".join((*pieces[:2], str(index), *pieces[3:]))
        option = self.chosen.get(part_of(twin)) if len(pieces) > 4 else None
        return option.format if option else "int8"

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with the zero blocks the plan asks for."""
        shares = tuple((f"{o.part}.*", o.sparsity) for o in self.chosen.values() if o.sparsity)
        if not shares:
            return recipe
        # A dense MLP's pattern must not reach into experts, which no layer has beside one.
        return replace(recipe, prune=Prune("16x16", 0.0, shares=shares, heal_steps=HEAL_STEPS))

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "explanation": self.explanation,
            "predicted_kl": sum(o.kl for o in self.chosen.values()),
            "bytes": sum(o.bytes for o in self.chosen.values()),
            "choices": _choices(self.options, self.chosen),
        }


def make_plan(source: Path, recipe: Recipe, corpus: Corpus, progress: Progress | None = None) -> PlanResult:
    """Measure every part and solve the knapsack for the recipe's budget. Holds the model in memory."""
    checkpoint = Checkpoint.open(source)
    options = measure(checkpoint, recipe, corpus, progress)
    chosen, why = solve(options, list(dict.fromkeys(o.part for o in options)), recipe)
    layers = ModelConfig.from_json(checkpoint.config).num_hidden_layers
    return PlanResult(chosen, options, f"{why}. {about_sparsity(options, chosen, recipe)}", layers)


def solve(options: Sequence[Option], parts: Sequence[str], recipe: Recipe) -> tuple[dict[str, Option], str]:
    """One option a part: the least KL within budget_bytes, or the fewest bytes within max_drop."""
    if recipe.budget_bytes is not None:
        limit = float(recipe.budget_bytes)
        chosen = knapsack(options, parts, cost="bytes", value="kl", limit=limit)
        why = f"least predicted loss within {recipe.budget_bytes:,} bytes of matrices"
    else:
        limit = SPENT * math.log1p(recipe.max_drop)
        chosen = knapsack(options, parts, cost="kl", value="bytes", limit=limit)
        why = (
            f"fewest bytes with a predicted loss of at most {SPENT:.0%} of {recipe.max_drop:.2%} "
            f"({limit:.5f} nats a token)"
        )
    kl, size = sum(o.kl for o in chosen.values()), sum(o.bytes for o in chosen.values())
    return chosen, f"{why}: predicted {kl:.5f} nats a token, {size:,} bytes"


def about_sparsity(options: Sequence[Option], chosen: Mapping[str, Option], recipe: Recipe) -> str:
    """What was measured of zero blocks, and what became of it."""
    tried = {o.part for o in options if o.sparsity}
    if not recipe.sparsities:
        return "The recipe asks for no zero blocks"
    if not tried:
        return "Zero blocks were not measured: 16x16 does not tile the feed-forwards, or they are too wide"
    levels = ", ".join(f"{s:.0%}" for s in recipe.sparsities)
    measured = f"Zero 16x16 blocks ({levels}) were measured in {len(tried)} feed-forwards"
    taken = [o for o in chosen.values() if o.sparsity]
    if taken:
        return f"{measured} and chosen in {len(taken)}"
    price = min(_price(o, options) for o in options if o.sparsity)
    rate = max((_price(o, options) for o in chosen.values() if o.format != "keep"), default=0.0)
    return (
        f"{measured} and chosen in none: the cheapest costs {price:.2e} nats a megabyte saved, "
        f"the dearest format chosen {rate:.2e}"
    )


def _price(option: Option, options: Sequence[Option]) -> float:
    """Nats a megabyte saved, against the next larger option without zeros of the same part."""
    plain = [o for o in options if o.part == option.part and not o.sparsity and o.bytes > option.bytes]
    if not plain:
        return 0.0 if not option.sparsity else math.inf
    nearest = min(plain, key=lambda o: o.bytes)
    return max(option.kl - nearest.kl, 0.0) / (nearest.bytes - option.bytes) * 1e6


def knapsack(
    options: Sequence[Option], parts: Sequence[str], cost: str, value: str, limit: float
) -> dict[str, Option]:
    """The multiple-choice knapsack by dynamic programming over CELLS cells of `cost`, minimizing `value`.

    Costs are rounded up, so the limit holds. Raises ValueError where even the cheapest options exceed it.
    """

    def cells(option: Option) -> int:
        return math.ceil(getattr(option, cost) / limit * CELLS - 1e-9) if limit > 0 else CELLS + 1

    table: list[tuple[float, tuple[Option, ...]] | None] = [None] * (CELLS + 1)
    table[0] = (0.0, ())
    for part in parts:
        following: list[tuple[float, tuple[Option, ...]] | None] = [None] * (CELLS + 1)
        for option in (o for o in options if o.part == part):
            step = 0 if getattr(option, cost) == 0 else cells(option)
            for used in range(CELLS + 1 - step):
                entry = table[used]
                if entry is None:
                    continue
                total = entry[0] + getattr(option, value)
                present = following[used + step]
                if present is None or total < present[0]:
                    following[used + step] = (total, (*entry[1], option))
        table = following
    best = min((e for e in table if e is not None), key=lambda e: e[0], default=None)
    if best is None:
        least = sum(min(getattr(o, cost) for o in options if o.part == p) for p in parts)
        raise ValueError(f"the budget is {limit:g} {cost}; the smallest plan needs {least:g}")
    return {o.part: o for o in best[1]}


def _choices(options: Sequence[Option], chosen: Mapping[str, Option]) -> list[dict[str, Any]]:
    columns = list(dict.fromkeys(o.name for o in options))
    rows = []
    for part, option in chosen.items():
        row: dict[str, Any] = {"part": part, "chosen": option.name, "bytes": option.bytes}
        own = {o.name: f"{o.kl:.6f}" for o in options if o.part == part}
        rows.append(row | {f"KL {name}": own.get(name, "") for name in columns})
    return rows
