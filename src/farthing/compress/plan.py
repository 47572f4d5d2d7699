"""The automatic plan: how few bits each part of the model can stand.

The damage of giving one part one format is measured: the KL divergence of the model's next-token
distributions on calibration text with only that part changed. For small changes these add up (Taylor), and
for a model that fits its data the mean KL is what log-perplexity rises by. So the best plan for a budget
is a knapsack: per part one option (bytes, KL), least KL within the bytes or fewest bytes within the KL.

Legend: T sample tokens; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.compress.corpus import Corpus
from farthing.compress.evaluate import paged_batch
from farthing.compress.layer import Layer
from farthing.compress.quantize.fp8 import quantize_fp8
from farthing.compress.quantize.grid import int4_grid, int8_grid
from farthing.compress.recipe import Recipe
from farthing.compress.stream import Progress
from farthing.compress.transform import group_for
from farthing.model import DeepseekModel, ModelConfig
from farthing.model.source import MemorySource
from farthing.ops import select
from farthing.ops.weights import Weight

OPTIONS = ("int4", "int8", "keep")
SAMPLE = 2048  # tokens a sensitivity is measured on
CELLS = 2000  # resolution of the knapsack's budget
GPTQ_GAIN = 0.5  # KL that GPTQ leaves of round-to-nearest's; an assumption, checked by the gate afterwards


@dataclass(frozen=True, slots=True)
class Option:
    """One format for one part."""

    part: str
    format: str
    bytes: int
    kl: float


@dataclass(slots=True)
class PlanResult:
    """The format of every module, and why."""

    formats: dict[str, str]  # part -> format
    parts: dict[str, str]  # module -> part
    options: list[Option]
    explanation: str
    predicted_kl: float
    bytes: int
    choices: list[dict[str, Any]] = field(default_factory=list)

    def format(self, module: str) -> str:
        """The plan in the form `stream.Job` wants."""
        return self.formats[self.parts[module]]

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "explanation": self.explanation,
            "predicted_kl": self.predicted_kl,
            "bytes": self.bytes,
            "choices": self.choices,
        }


def make_plan(source: Path, recipe: Recipe, corpus: Corpus, progress: Progress | None = None) -> PlanResult:
    """Measure every part and solve the knapsack for the recipe's budget. Holds the model in memory."""
    checkpoint = Checkpoint.open(source)
    config = ModelConfig.from_json(checkpoint.config)
    layers = [Layer.read(checkpoint, config, i) for i in range(config.num_hidden_layers)]
    tensors = {n: checkpoint.tensor(n).float() for n in ("model.embed_tokens.weight", "model.norm.weight")}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = checkpoint.weight("lm_head").dequantize()
    for layer in layers:
        tensors |= layer.tensors
    parts = {module: part_of(module) for layer in layers for module in layer.modules()}
    sample = _sample(corpus)
    meter = _Meter(config, tensors, sample)
    names = list(dict.fromkeys(parts.values()))
    options = []
    for i, part in enumerate(names):
        if progress:
            progress(f"sensitivity of {part}", i, len(names))
        modules = [m for m, p in parts.items() if p == part]
        options += _options(part, modules, meter, layers, recipe)
    chosen, why = solve(options, names, recipe)
    _add_mtp(checkpoint, config, parts, chosen)
    result = PlanResult(
        formats={o.part: o.format for o in chosen.values()} | {"mtp": "int8"},
        parts=parts,
        options=options,
        explanation=why,
        predicted_kl=sum(o.kl for o in chosen.values()),
        bytes=sum(o.bytes for o in chosen.values()),
    )
    result.choices = _choices(options, chosen)
    return result


def part_of(module: str) -> str:
    """The unit of choice: a layer's attention, its routed experts, its shared expert or its dense MLP."""
    pieces = module.split(".")
    layer = ".".join(pieces[:3])
    if "self_attn" in pieces:
        return f"{layer}.self_attn"
    return f"{layer}.mlp.{pieces[4]}" if pieces[4] in ("experts", "shared_experts") else f"{layer}.mlp"


def _add_mtp(checkpoint: Checkpoint, config: ModelConfig, parts: dict[str, str], chosen: Any) -> None:
    """MTP layers only draft: a wrong draft costs time and never accuracy, so they get 8 bits unmeasured."""
    for i in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        for name in checkpoint.names():
            if name.startswith(f"model.layers.{i}."):
                parts[name.rpartition(".")[0]] = "mtp"


def _sample(corpus: Corpus) -> list[Tensor]:
    rows, tokens = [], 0
    for window in corpus.windows:
        if tokens >= SAMPLE:
            break
        rows.append(window.ids[:-1])
        tokens += window.tokens
    return rows


class _Meter:
    """KL of the model with some tensors replaced against the model as it is, on one sample."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], rows: Sequence[Tensor]) -> None:
        import dataclasses

        self.config = dataclasses.replace(config, num_nextn_predict_layers=0)
        self.tensors = tensors
        self.ids = torch.cat(list(rows))
        self.batch, self.blocks = paged_batch([len(r) for r in rows])
        self.base = self._log_probs({})  # [T, V]

    def kl(self, changed: Mapping[str, Tensor]) -> float:
        """Mean KL(base || changed) in nats a token."""
        other = self._log_probs(changed)
        total = sum(
            float((p.exp() * (p - q)).sum(dtype=torch.float64))
            for p, q in zip(self.base.split(512), other.split(512), strict=True)
        )
        return max(total / len(self.ids), 0.0)

    def _log_probs(self, changed: Mapping[str, Tensor]) -> Tensor:
        model = DeepseekModel(self.config, select("reference"), MemorySource({**self.tensors, **changed}))
        cache = model.new_cache(self.blocks, 16, "float32")
        return model.logits(model.forward(self.ids, self.batch, cache)).log_softmax(-1)


def _options(
    part: str, modules: Sequence[str], meter: _Meter, layers: Sequence[Layer], recipe: Recipe
) -> list[Option]:
    by_index = {layer.index: layer for layer in layers}
    layer = by_index[int(modules[0].split(".")[2])]
    options = []
    for kind in OPTIONS:
        weights = {m: _quick(layer, m, kind, recipe) for m in modules}
        size = sum(w.nbytes for w in weights.values())
        if kind == "keep":
            options.append(Option(part, kind, size, 0.0))
            continue
        kl = meter.kl({f"{m}.weight": w.dequantize() for m, w in weights.items()})
        options.append(Option(part, kind, size, kl * (GPTQ_GAIN if kind == "int4" else 1.0)))
    return options


def _quick(layer: Layer, module: str, kind: str, recipe: Recipe) -> Weight:
    """Round to nearest: the damage of a format, without the time its best method takes."""
    w = layer.weight(module)
    group = group_for(w.shape[1], recipe.group_size)
    if kind == "int4" and group is not None:
        grid = int4_grid(w[None], group)
        return grid.weights(grid.round(w[None]))[0]
    if kind in ("int4", "int8"):
        grid = int8_grid(w[None])
        return grid.weights(grid.round(w[None]))[0]
    if layer.formats.get(module) == "fp8":
        return quantize_fp8(w, module)
    return Weight("dense", w.to(layer.stored.get(f"{module}.weight", torch.bfloat16)))


def solve(options: Sequence[Option], parts: Sequence[str], recipe: Recipe) -> tuple[dict[str, Option], str]:
    """One option a part: the least KL within budget_bytes, or the fewest bytes within max_drop."""
    if recipe.budget_bytes is not None:
        limit = float(recipe.budget_bytes)
        chosen = knapsack(options, parts, cost="bytes", value="kl", limit=limit)
        why = f"least predicted loss within {recipe.budget_bytes:,} bytes of matrices"
    else:
        limit = math.log1p(recipe.max_drop)
        chosen = knapsack(options, parts, cost="kl", value="bytes", limit=limit)
        why = (
            f"fewest bytes with a predicted loss of at most {recipe.max_drop:.2%} ({limit:.5f} nats a token)"
        )
    kl, size = sum(o.kl for o in chosen.values()), sum(o.bytes for o in chosen.values())
    return chosen, f"{why}: predicted {kl:.5f} nats a token, {size:,} bytes"


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
    rows = []
    for part, option in chosen.items():
        row: dict[str, Any] = {"part": part, "chosen": option.format, "bytes": option.bytes}
        row |= {f"KL {o.format}": f"{o.kl:.6f}" for o in options if o.part == part}
        rows.append(row)
    return rows
