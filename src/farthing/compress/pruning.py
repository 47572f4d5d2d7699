"""The masks of one layer, and its remaining weights after they compensate for the cut ones.

Legend: B matrices of one shape at once; N rows; K columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from farthing.compress.calibrate.recorder import InputStats
from farthing.compress.layer import Layer
from farthing.compress.prune.masks import BLOCKS, block_scores, global_budgets, mask, scores
from farthing.compress.prune.obs import Trace, block_trace, cheapest, least_squares, saliency
from farthing.compress.quantize.sweep import Feedback, sweep
from farthing.compress.recipe import Prune, Recipe
from farthing.compress.trace import input_name

MOST = 0.9  # maximum share that a strip of blocks loses
GRAM_BYTES = 2**26  # of float64 grams in memory at once
Stats = dict[str, InputStats]


def prune_layer(layer: Layer, stats: Stats, recipe: Recipe) -> dict[str, Tensor]:
    """Prune `layer` by the recipe and update its remaining weights; returns module -> mask [N, K]."""
    p = recipe.prune
    if p is None:
        return {}
    masks = (
        _traced(layer, stats, p) if p.score == "obs" and p.pattern in BLOCKS_OBS else _scored(layer, stats, p)
    )
    for family in layer.families():
        for part in parts_of(layer, [m for m in family if m in masks]):
            w = torch.stack([layer.weight(m) for m in part])
            keep = torch.stack([masks[m] for m in part])
            for module, value in zip(part, _remaining(w, keep, grams_of(stats, part), recipe), strict=True):
                layer.set(module, value)
    return masks


BLOCKS_OBS = tuple(b for b in BLOCKS if b != "unstructured")


def _remaining(w: Tensor, keep: Tensor, gram: Tensor | None, recipe: Recipe) -> Tensor:
    p = recipe.prune
    assert p is not None
    if p.compensation == "none" or gram is None:
        return w * keep
    if p.compensation == "sweep":
        return sweep(w, Feedback.of(gram, recipe.act_order, recipe.damp), keep=keep)[0]
    return least_squares(w, gram, keep, BLOCKS.get(p.pattern, (1, 1))[0], recipe.damp)


def parts_of(layer: Layer, family: list[str]) -> Iterator[list[str]]:
    """Split a family so that its grams fit in memory."""
    if family:
        k = layer.weight(family[0]).shape[1]
        size = max(1, GRAM_BYTES // (8 * k * k))
        yield from (family[i : i + size] for i in range(0, len(family), size))


def grams_of(stats: Stats, family: list[str]) -> Tensor | None:
    """Second moments [B, K, K], None if one is missing."""
    known = [s.gram for m in family if (s := stats.get(input_name(m))) is not None and s.gram is not None]
    return torch.stack(known) if len(known) == len(family) else None


def targets_of(layer: Layer, p: Prune) -> Iterator[list[str]]:
    """The modules to prune, family by family."""
    for family in layer.families():
        targets = [m for m in family if (p.targets == "all" or ".mlp." in m) and p.share(m) > 0]
        if targets:
            yield targets


# -- blocks, by the cost of cutting them one after the other


def _traced(layer: Layer, stats: Stats, p: Prune) -> dict[str, Tensor]:
    """Masks by the costs of `block_trace`. `scope`: strips of a matrix, family or layer share a threshold.

    Across families, costs are relative to the family's output energy.
    """
    cells = BLOCKS[p.pattern]
    masks: dict[str, Tensor] = {}
    groups: list[list[tuple[list[str], Trace, int]]] = []
    for family in targets_of(layer, p):
        entries = []
        for part in parts_of(layer, family):
            w, gram = torch.stack([layer.weight(m) for m in part]), grams_of(stats, part)
            if gram is None:
                raise ValueError(f"{part[0]} has no input statistics; score 'obs' needs calibration text")
            if any(size % cell for size, cell in zip(w.shape[1:], cells, strict=True)):
                raise ValueError(
                    f"{part[0]} is {w.shape[1]}x{w.shape[2]}, which blocks of {p.pattern} do not tile; set "
                    "its sparsity to 0 in prune.shares, or choose another pattern"
                )
            trace = block_trace(w, gram, cells, MOST)
            if p.scope == "layer":
                trace = Trace(trace.order, trace.cost / ((w @ gram) * w).sum().clamp_min(1e-30) * len(part))
            entries.append((part, trace, w.shape[2]))
        groups += [[e] for e in _single(entries)] if p.scope == "matrix" else [entries]
    if p.scope == "layer":
        groups = [[e for group in groups for e in group]]
    for group in groups:
        wanted = sum(p.share(m) * t.order.shape[1] * (k // cells[1]) for part, t, k in group for m in part)
        dropped = cheapest([t for _, t, _ in group], round(wanted))
        for (part, trace, k), drop in zip(group, dropped, strict=True):
            masks |= dict(zip(part, trace.keep(drop, cells, k), strict=True))
    return masks


def _single(entries: list[tuple[list[str], Trace, int]]) -> Iterator[tuple[list[str], Trace, int]]:
    for part, trace, k in entries:
        for i, module in enumerate(part):
            yield [module], Trace(trace.order[i : i + 1], trace.cost[i : i + 1]), k


# -- anything, by a score of each weight


def _scored(layer: Layer, stats: Stats, p: Prune) -> dict[str, Tensor]:
    budgets = _budgets(layer, stats, p)
    per_row = p.score in ("wanda", "obs") and p.pattern == "unstructured"
    return {
        m: mask(_score(layer.weight(m), stats.get(input_name(m)), p, mean=True), share, p.pattern, per_row)
        for m, share in budgets.items()
    }


def _score(w: Tensor, st: InputStats | None, p: Prune, mean: bool) -> Tensor:
    """Scores of one matrix, using input energies as a mean over tokens or as a sum."""
    if p.score == "obs":
        if st is None or st.gram is None:
            raise ValueError("score 'obs' needs calibration text; expected second moments of every input")
        return saliency(w[None], st.gram[None])[0]
    energy = None if st is None else st.mean_energy() if mean else st.energy
    return scores(w, energy, p.score)


def _budgets(layer: Layer, stats: Stats, p: Prune) -> dict[str, float]:
    """Sparsity of each module: the recipe's, or from one threshold over a family or the layer.

    Experts of a layer compete: energy is summed over all tokens, so an expert with few tokens loses more.
    Families (all gates, all downs, one attention matrix) are normalized by their mean and compete within the
    layer if the scope is the layer.
    """
    budgets: dict[str, float] = {}
    pieces: dict[str, Tensor] = {}
    for targets in targets_of(layer, p):
        if p.scope == "matrix":
            budgets |= {m: p.share(m) for m in targets}
            continue
        cells = BLOCKS.get(p.pattern, (1, 1))
        blocks = {
            m: block_scores(_score(layer.weight(m), stats.get(input_name(m)), p, mean=False), cells)
            for m in targets
        }
        average = torch.cat([b.flatten() for b in blocks.values()]).mean().clamp_min(1e-30)
        if p.scope == "family":
            budgets |= global_budgets(blocks, p.share(targets[0]))
        pieces |= {m: b / average for m, b in blocks.items()}
    return global_budgets(pieces, p.sparsity) if p.scope == "layer" else budgets
