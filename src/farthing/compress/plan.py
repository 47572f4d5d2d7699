"""The automatic plan: how few bits each part of the model tolerates.

The damage of each format in each part is measured alone (`sensitivity.py`). For small changes damages add up
(Taylor), and for a model that fits its data the mean KL equals the rise of log-perplexity. So the best plan
for a budget is a knapsack: one option (bytes, KL) per part, with the least KL within the bytes or the fewest
bytes within the KL. Bytes are those of the whole model: in memory, in files, or read per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from math import prod
from operator import add
from pathlib import Path
from typing import Any, TypeVar

from farthing.checkpoint.reader import Checkpoint
from farthing.compress.evaluate import Corpus
from farthing.compress.recipe import Recipe
from farthing.compress.sensitivity import Notes, Option, measure, part_of
from farthing.compress.size import Measure, Sizes, head_in_8_bits, reads_of, sizes_of
from farthing.compress.source import PlainCheckpoint
from farthing.compress.stream import STATE, Progress, fingerprint
from farthing.model import ModelConfig, Parameters

# The multiple-choice knapsack: one option per row, least total value within a cost limit.

T = TypeVar("T")


def knapsack(
    rows: Sequence[Sequence[T]],
    cost: Callable[[T], float],
    value: Callable[[T], float],
    limit: float,
    cells: int,
) -> list[T]:
    """Dynamic programming, minimizing the total value. Of the choices whose costs are in one of `cells` equal
    parts of the limit, the best continues.

    If none of those fits, the cheapest choice is taken. Raises ValueError if it does not fit either.
    """
    best: list[tuple[float, float, list[T]]] = [(0.0, 0.0, [])]  # (cost, value, choice)
    for row in rows:
        reached: dict[int, tuple[float, float, list[T]]] = {}
        for spent, total, chosen in best:
            for option in row:
                used, candidate = spent + cost(option), total + value(option)
                cell = int(used / limit * cells) if limit > 0 else 0
                if used <= limit * (1 + 1e-12) and (
                    cell not in reached or (candidate, used) < (reached[cell][1], reached[cell][0])
                ):
                    reached[cell] = (used, candidate, [*chosen, option])
        best = _undominated(reached.values())
    if best:
        return min(best, key=lambda entry: entry[1])[2]
    cheapest = [min(row, key=cost) for row in rows]
    least = sum(map(cost, cheapest))
    if least > limit:
        raise ValueError(f"the limit is {limit:g}; expected at least {least:g}, the cheapest plan")
    return cheapest


def _undominated(reached: Iterable[tuple[float, float, list[T]]]) -> list[tuple[float, float, list[T]]]:
    """Drop choices that another one beats in both cost and value."""
    kept, least = [], math.inf
    for entry in sorted(reached, key=lambda entry: entry[:2]):
        if entry[1] < least:
            kept.append(entry)
            least = entry[1]
    return kept


_LARGEST_GROUP = 128  # columns per scale
CELLS = 2000  # resolution of the knapsack's budget
SPENT = 0.6  # of max_drop; the rest leaves room for the gate's interval


@dataclass(frozen=True, slots=True)
class PlanResult:
    """The chosen option of each part, with an explanation."""

    chosen: dict[str, Option]  # by part
    options: list[Option]
    explanation: str
    layers: int  # layers from this index on are MTP layers
    rest: Sizes  # of parts without options: embedding, head, norms, routers
    measure: Measure

    def format(self, module: str) -> str:
        """The format of a module, for `stream.Compression`; modules without options get 8 bits."""
        option = self.chosen.get(part_of(twin_of(module, self.layers)))
        return option.format if option else "int8"

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-serializable values, for the report."""
        return {
            "explanation": self.explanation,
            "measure": self.measure,
            "predicted_kl": sum(o.kl for o in self.chosen.values()),
            "predicted": asdict(_total(self.chosen, self.rest)),
            "unplanned": asdict(self.rest),
            "choices": _choices(self.options, self.chosen),
        }


def make_plan(
    source: Path, out: Path, recipe: Recipe, corpus: Corpus, progress: Progress | None = None
) -> PlanResult:
    """Measure every part and solve the knapsack for the recipe's budget.

    Measurements are kept next to OUT's shards until OUT is complete, so a killed run resumes, and a run with
    another budget reuses them.
    """
    checkpoint = PlainCheckpoint.open(source)
    config = ModelConfig.from_json(checkpoint.config)
    if recipe.budget_bytes is not None:  # refused before any work
        least, rest = whole_model(checkpoint, config, _least(checkpoint, config), recipe)
        _refuse_small(_total({o.part: o for o in least}, rest), recipe, rest)
    asked = replace(recipe, max_drop=None, budget_bytes=None, measure="memory")
    notes = Notes(out / STATE / "sensitivity.json", fingerprint(source, asked, "", corpus))
    options = measure(checkpoint, recipe, corpus, progress, notes)
    options, rest = whole_model(checkpoint, config, options, recipe)
    parts = list(dict.fromkeys(o.part for o in options))
    chosen, why = solve(options, parts, recipe, rest)
    return PlanResult(chosen, options, why, config.num_hidden_layers, rest, recipe.measure)


def twin_of(module: str, layers: int) -> str:
    """The module whose format a module takes: for an MTP layer, that of the last measured layer.

    MTP layers only draft: a wrong draft costs time but never accuracy, so they are not measured.
    """
    pieces = module.split(".")
    return ".".join((*pieces[:2], str(min(int(pieces[2]), layers - 1)), *pieces[3:]))


def whole_model(
    checkpoint: Checkpoint, config: ModelConfig, options: Sequence[Option], recipe: Recipe
) -> tuple[list[Option], Sizes]:
    """Options whose sizes include the MTP layers that copy them, and the sizes of all other parts."""
    layers = config.num_hidden_layers
    parts = {o.part for o in options}
    own: dict[str, int] = {}  # parameters of each part
    following: dict[str, int] = {}  # of MTP layers that copy it
    alone = 0  # bytes of matrices in MTP layers that copy none, at 8 bits
    shape = 16 if recipe.activations == "none" else 0  # stored with packed integers: two of 64 bits
    is_matrix = Parameters(config).rounds
    matrices = [m for m in _modules(checkpoint) if is_matrix(m)]
    for module in matrices:
        n, k = checkpoint.weight(module).shape
        part = part_of(twin_of(module, layers))
        if int(module.split(".")[2]) < layers:
            own[part] = own.get(part, 0) + n * k
        elif part in parts:
            following[part] = following.get(part, 0) + n * k
        else:
            alone += n * k + 4 * n + shape
    rest = sizes_of(checkpoint, reads_of(config), counts=lambda m: not is_matrix(m))
    head, rounded = head_in_8_bits(checkpoint)
    stored = checkpoint.weight(head).nbytes
    written = 2 * prod(checkpoint.weight(head).shape) if checkpoint.is_quantized(head) else stored
    served = min(written, rounded) if recipe.head == "int8" else written
    rest += Sizes(written - stored, served - stored, served - stored)

    def counted(option: Option) -> Option:
        twins = round(option.sizes.file * following.get(option.part, 0) / own[option.part])
        return replace(option, sizes=option.sizes + Sizes(twins, twins, 0))

    return [counted(o) for o in options], rest + Sizes(alone, alone, 0)


def _least(checkpoint: Checkpoint, config: ModelConfig) -> list[Option]:
    """Every part at 4 bits with the fewest scales, which no measured option is smaller than."""
    reads, sizes = reads_of(config), dict[str, Sizes]()
    for module in filter(Parameters(config).rounds, _modules(checkpoint)):
        if int(module.split(".")[2]) < config.num_hidden_layers:
            n, k = checkpoint.stored_as(module)[1]
            own = n * k // 2 + 2 * n * -(-k // _LARGEST_GROUP)
            part = part_of(module)
            sizes[part] = sizes.get(part, Sizes(0, 0, 0)) + Sizes(own, own, round(own * reads(module)))
    return [Option(part, "int4", size, 0.0) for part, size in sizes.items()]


def _refuse_small(smallest: Sizes, recipe: Recipe, rest: Sizes) -> None:
    """Raise ValueError if the smallest plan exceeds the budget."""
    measure, budget = recipe.measure, recipe.budget_bytes
    if budget is not None and smallest.of(measure) > budget:
        raise ValueError(
            f"budget_bytes: got {budget:,} ({_NAMES[measure]}); expected at least {smallest.of(measure):,}, "
            f"the smallest plan (of it {rest.of(measure):,} for embedding, head, norms and routers)"
        )


def _modules(checkpoint: Checkpoint) -> list[str]:
    return list(dict.fromkeys(n.rpartition(".")[0] for n in checkpoint.names()))


def solve(
    options: Sequence[Option], parts: Sequence[str], recipe: Recipe, rest: Sizes
) -> tuple[dict[str, Option], str]:
    """One option per part: the least KL within budget_bytes, or the fewest bytes within max_drop.

    Raises ValueError if nothing fits the budget, or only plans that certainly exceed max_drop.
    """
    measure, drop = recipe.measure, recipe.allowed_drop

    def size(option: Option) -> int:
        return option.sizes.of(measure)

    def kl(option: Option) -> float:
        return option.kl

    if recipe.budget_bytes is None:
        assert drop is not None
        limit = SPENT * math.log1p(drop)
        chosen = one_per_part(options, parts, kl, size, limit)
        why = (
            f"fewest bytes ({_NAMES[measure]}) with a predicted loss of at most {SPENT:.0%} of {drop:.2%} "
            f"({limit:.5f} nats per token)"
        )
        return chosen, f"{why}: {_figures(chosen, rest)}"
    smallest = _total({p: min((o for o in options if o.part == p), key=size) for p in parts}, rest)
    _refuse_small(smallest, recipe, rest)
    chosen = one_per_part(options, parts, size, kl, recipe.budget_bytes - rest.of(measure))
    predicted = sum(o.kl for o in chosen.values())
    if drop is not None and predicted > math.log1p(drop):
        enough = _total(one_per_part(options, parts, kl, size, math.log1p(drop)), rest).of(measure)
        raise ValueError(
            f"budget_bytes: got {recipe.budget_bytes:,} ({_NAMES[measure]}), with a predicted perplexity "
            f"increase of {math.expm1(predicted):.2%}, above max_drop {drop:.2%}; expected a budget of "
            f"{enough:,} or more, or a larger max_drop"
        )
    why = f"least predicted loss within {recipe.budget_bytes:,} bytes ({_NAMES[measure]})"
    return chosen, f"{why}: {_figures(chosen, rest)}"


_NAMES: dict[Measure, str] = {
    "memory": "the whole model in the kernels' layout",
    "file": "all weight files",
    "token": "weights read per decoded token",
}


def _total(chosen: Mapping[str, Option], rest: Sizes) -> Sizes:
    return reduce(add, (o.sizes for o in chosen.values()), rest)


def _figures(chosen: Mapping[str, Option], rest: Sizes) -> str:
    return f"predicted {sum(o.kl for o in chosen.values()):.5f} nats per token; {_total(chosen, rest)}"


def one_per_part(
    options: Sequence[Option],
    parts: Sequence[str],
    cost: Callable[[Option], float],
    value: Callable[[Option], float],
    limit: float,
) -> dict[str, Option]:
    """The knapsack over parts. Raises ValueError if even the cheapest plan exceeds the limit."""
    rows = [[o for o in options if o.part == part] for part in parts]
    return {o.part: o for o in knapsack(rows, cost, value, limit, CELLS)}


def _choices(options: Sequence[Option], chosen: Mapping[str, Option]) -> list[dict[str, Any]]:
    columns = list(dict.fromkeys(o.format for o in options))
    rows = []
    for part, option in chosen.items():
        row: dict[str, Any] = {"part": part, "chosen": option.format} | asdict(option.sizes)
        own = {o.format: f"{o.kl:.6f}" for o in options if o.part == part}
        rows.append(row | {f"KL {name}": own.get(name, "") for name in columns})
    return rows
