"""Apply a recipe to one layer: from statistics to compressed weights and a report.

Legend: B matrices of one shape at once; N rows; K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from farthing.checkpoint.compressed_tensors import key_of
from farthing.compress.calibrate import InputStats, Recorder, with_fallbacks
from farthing.compress.layer import Layer
from farthing.compress.quantize import (
    Feedback,
    Grid,
    energy_of,
    even_grid,
    fitted_grid,
    int8_grid,
    output_error,
    quantize_fp8,
    sweep,
)
from farthing.compress.recipe import Recipe
from farthing.compress.size import zero_block_bytes
from farthing.compress.work import Done, LayerResult
from farthing.model.config import ModelConfig
from farthing.ops.weights import Weight

GROUPED = ("int4", "int5")  # formats whose groups of columns have scales
GRAM_BYTES = 2**26  # of float64 grams in memory at once
Stats = dict[str, InputStats]
Plan = Callable[[str], str]  # module -> keep | dense | int8 | int5 | int4 | int4-32 | int5-64 | ... | fp8


def compress_layer(
    layer: Layer,
    recorder: Recorder | None,
    recipe: Recipe,
    plan: Plan,
    masks: Mapping[str, Tensor] | None = None,
    originals: Mapping[str, Tensor] | None = None,
    advance: Callable[[float], None] = lambda share: None,
) -> LayerResult:
    """Round every matrix. `layer` then has the values that were written.

    masks: of pruned modules, whose zeros stay. originals: the reference for errors; None: `layer`, each of
    whose matrices is then released as soon as it is rounded. advance: called with the share of matrices that
    are done.
    """
    result = LayerResult()
    stats, rare = layer_stats(layer, recorder)
    masks = masks or {}
    if layer.is_moe and recorder is not None:
        seen = recorder.experts.get(f"{layer.prefix}mlp")
        tokens = [0] * layer.experts if seen is None else seen.tolist()
        tokens += [0] * (layer.experts - len(tokens))
        result.coverage = {"tokens_per_expert": tokens, "fallbacks": sorted(rare)}

    def compress(unit: Unit) -> dict[str, Done]:
        return _compress_unit(layer, unit, stats, recipe, plan, originals, masks)

    units = _units(layer)
    for i, modules in enumerate(_each(compress, units), 1):
        result.modules |= modules
        advance(i / len(units))
    if recipe.activations == "token":
        for done in result.modules.values():
            if done.weight.format in ("int8", "int4"):
                done.key = key_of(done.weight, "token")
    return result


def layer_stats(layer: Layer, recorder: Recorder | None) -> tuple[Stats, set[str]]:
    """Statistics by input name, with those of peers for rare experts."""
    if recorder is None:
        return {}, set()
    stats, rare = dict(recorder.inputs), set()
    for part in ("gate_proj", "down_proj"):
        names = [f"{layer.prefix}mlp.experts.{e}.{part}" for e in range(layer.experts)]
        if names:
            width = layer.weight(names[0]).shape[1]
            filled, missing = with_fallbacks(recorder.inputs, names, least=max(8, width // 4))
            stats.update(filled)
            rare.update(missing)
    return stats, rare


def parts_of(layer: Layer, family: list[str]) -> Iterator[list[str]]:
    """Split a family so that its grams fit in memory."""
    if family:
        k = layer.weight(family[0]).shape[1]
        size = max(1, GRAM_BYTES // (8 * k * k))
        yield from (family[i : i + size] for i in range(0, len(family), size))


def grams_of(layer: Layer, stats: Stats, family: list[str]) -> Tensor | None:
    """Second moments [B, K, K], None if one is missing."""
    known = [s.gram for m in family if (s := stats.get(layer.reads(m))) is not None and s.gram is not None]
    return torch.stack(known) if len(known) == len(family) else None


Unit = list[list[str]]  # parts of families, such as some experts' gates and the same experts' ups


def _each(compress: Callable[[Unit], dict[str, Done]], units: list[Unit]) -> Iterator[dict[str, Done]]:
    """Results in the order of the units. Experts are compressed side by side, each by one thread: a sweep is
    thousands of small steps, at whose ends several threads of one would wait for each other."""
    shared = [unit for unit in units if ".experts." not in unit[0][0]]
    yield from map(compress, shared)
    with single_threaded() as threads, ThreadPoolExecutor(threads) as pool:
        yield from pool.map(compress, [unit for unit in units if ".experts." in unit[0][0]])


@contextmanager
def single_threaded() -> Iterator[int]:
    """Torch ops run on the thread that calls them; yields the number of threads that they used before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _units(layer: Layer) -> list[Unit]:
    """The layer's matrices, grouped by their inputs."""
    units: dict[tuple[str, ...], Unit] = {}
    for family in layer.families():
        for part in parts_of(layer, family):
            units.setdefault(tuple(map(layer.reads, part)), []).append(part)
    return list(units.values())


def round_piece(config: ModelConfig, recipe: Recipe, w: Tensor, recorder: Recorder) -> None:
    """Round one matrix as it would be of a model, by the statistics of the recorder's only input."""
    name = "model.layers.0.mlp.down_proj"
    layer = Layer(config, 0, {f"{name}.weight": w})
    _compress_unit(
        layer, [[name]], {name: recorder.inputs[""]}, recipe, lambda module: recipe.scheme, None, {}
    )


def _compress_unit(
    layer: Layer,
    unit: Unit,
    stats: Stats,
    recipe: Recipe,
    plan: Plan,
    originals: Mapping[str, Tensor] | None,
    masks: Mapping[str, Tensor],
) -> dict[str, Done]:
    """Compress parts that read the same inputs, whose second moments are factored once."""
    gram = grams_of(layer, stats, unit[0])
    sweeps = recipe.algorithm == "gptq" and gram is not None
    back = Feedback.of(gram, recipe.act_order, recipe.damp) if sweeps and gram is not None else None
    done: dict[str, Done] = {}
    for part in unit:
        done |= _compress_part(layer, part, gram, back, stats, recipe, plan, originals, masks)
    return done


def _compress_part(
    layer: Layer,
    family: list[str],
    gram: Tensor | None,
    back: Feedback | None,
    stats: Stats,
    recipe: Recipe,
    plan: Plan,
    originals: Mapping[str, Tensor] | None,
    masks: Mapping[str, Tensor],
) -> dict[str, Done]:
    done: dict[str, Done] = {}
    w = torch.stack([layer.weight(m) for m in family])
    inputs = [stats.get(layer.reads(m)) for m in family]
    energy = torch.stack([s.mean_energy() for s in inputs if s]) if all(inputs) else None
    keep = torch.stack([masks[m] for m in family]) if family[0] in masks else None
    formats = {
        m: stored_format(m, plan(m), recipe, layer.formats.get(m, "dense"), layer.group_columns(m))
        for m in family
    }
    for kind in sorted(set(formats.values())):
        index = [i for i, m in enumerate(family) if formats[m] == kind]
        pick = slice(None) if len(index) == len(family) else torch.tensor(index)
        part = _Part(
            w[pick],
            None if energy is None else energy[pick],
            None if gram is None else gram[pick],
            None if back is None else back[pick],
            None if keep is None else keep[pick],
        )
        values, weights, squared = _round(part, kind, recipe, [family[i] for i in index], layer)
        before = part.w if originals is None else torch.stack([originals[family[i]] for i in index])
        errors = _errors(before, values, part.gram, squared if originals is None else None)
        for j, i in enumerate(index):
            module = family[i]
            st = inputs[i]
            sample = None if st is None or not len(st.rows) else st.rows
            error = float(errors[j]) if errors is not None else _sampled_error(before[j], values[j], sample)
            layer.set(module, values[j].clone())  # reuses the memory of its original
            done[module] = Done(weights[j], key_of(weights[j]), None, {
                "module": module,
                "format": weights[j].format,
                "bits": 8 * weights[j].nbytes / w[0].numel(),
                "zero_block_bytes": zero_block_bytes(weights[j], None if keep is None else values[j] != 0),
                "group_size": weights[j].group_size if weights[j].grouped else None,
                "sparsity": float((values[j] == 0).float().mean()) if keep is not None else 0.0,
                "error": error,
                "statistics": st.fallback if st else None,
            })  # fmt: skip
    return done


@dataclass(frozen=True, slots=True)
class _Part:
    """Matrices of one family that share a format."""

    w: Tensor  # [B, N, K]
    energy: Tensor | None  # [B, K]
    gram: Tensor | None  # [B, K, K]
    back: Feedback | None  # of the gram
    keep: Tensor | None  # [B, N, K]


def _round(
    part: _Part, kind: str, recipe: Recipe, names: Sequence[str], layer: Layer
) -> tuple[Tensor, list[Weight], Tensor | None]:
    """(values [B, N, K], weights, squared output error [B] if it is known) of one format."""
    value, squared = part.w, None
    if kind.startswith("int"):
        clip = part.gram if recipe.clips_outputs else None
        grid = grid_of(part.w, part.energy, kind, recipe, layer.group_columns(names[0]), clip)
        if part.back is not None:
            value, squared = sweep(value, part.back, grid, part.keep)
        else:
            value = grid.round(value)
        weights = grid.weights(value if part.keep is None else value * part.keep)
    elif kind == "fp8":
        weights = [quantize_fp8(value[b], name) for b, name in enumerate(names)]
    else:
        dtypes = [layer.stored.get(f"{name}.weight", torch.bfloat16) for name in names]
        weights = [Weight("dense", value[b].to(dtype)) for b, dtype in enumerate(dtypes)]
    return torch.stack([w.dequantize() for w in weights]), weights, squared


def _errors(before: Tensor, after: Tensor, gram: Tensor | None, squared: Tensor | None) -> Tensor | None:
    """Relative output errors, [B]; None without a gram. squared: the absolute ones, if they are known."""
    if gram is None:
        return None
    if squared is None:
        return output_error(before, after, gram)
    return squared / energy_of(before, gram, short=True).clamp_min(1e-30)


def grid_of(
    w: Tensor, energy: Tensor | None, kind: str, recipe: Recipe, columns: int, gram: Tensor | None = None
) -> Grid:
    if kind == "int8":
        return int8_grid(w, energy)
    group = group_for(columns, wanted_group(kind, recipe)) or columns
    if kind.startswith("int5"):
        return even_grid(w, group, energy, gram=gram, bits=5)
    if recipe.values == "fitted":
        return fitted_grid(w, group, energy)
    return even_grid(w, group, energy, recipe.symmetric, gram)


def wanted_group(kind: str, recipe: Recipe) -> int:
    """The group size of a plan's format (`int4-32`), or the recipe's (`int4`, `int5`)."""
    _, _, size = kind.partition("-")
    return int(size) if size else recipe.group_size


def group_for(columns: int, wanted: int) -> int | None:
    """The largest of 128, 64 and 32 that is at most `wanted` and divides the columns."""
    return next((g for g in (128, 64, 32) if g <= wanted and columns % g == 0), None)


def stored_format(module: str, planned: str, recipe: Recipe, source: str, columns: int) -> str:
    """The planned format, or the source's for "keep", if results can be in it, else dense; 8 bits if groups
    do not divide the columns. Ignored modules are dense."""
    if any(fnmatchcase(module, pattern) for pattern in recipe.ignore):
        return "dense"
    kind = source if planned == "keep" else planned
    kind = {"nl4": "int4", "q5_0": "int5"}.get(kind, kind)
    if kind.startswith(GROUPED) and (
        group_for(columns, wanted_group(kind, recipe)) is None
        or any(fnmatchcase(module, pattern) for pattern in recipe.wide)
    ):
        return "int8"
    return kind if kind.partition("-")[0] in ("int8", *GROUPED, "fp8") else "dense"


def _sampled_error(w: Tensor, value: Tensor, rows: Tensor | None) -> float:
    """Relative output error on the sampled inputs, or of the weights alone if there are no samples."""
    x = rows if rows is not None else torch.eye(w.shape[1])
    exact = x @ w.t()
    return float((x @ value.t() - exact).square().sum() / exact.square().sum().clamp_min(1e-30))
