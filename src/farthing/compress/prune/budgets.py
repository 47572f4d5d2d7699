"""One threshold over the whole model: the share of every family that falls below it.

The checkpoint is read once more, a layer at a time. Of each family a histogram stays: scores are positive
floats, whose bits are in the order of their values: the first 17 behind the sign tell 1 in 512 apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from farthing.compress.layer import Layer
from farthing.compress.prune.masks import BLOCKS, block_scores, scores
from farthing.compress.pruning import MOST, targets_of
from farthing.compress.recipe import Prune

BITS = 17


def spread(layers: Iterable[Layer], prune: Prune) -> Prune:
    """`prune` with scope 'global' as shares of families, in which the experts of a layer go on competing.

    No family loses more than MOST; what it keeps is not taken elsewhere.
    """
    counts: dict[str, Tensor] = {}
    for layer in layers:
        for family in targets_of(layer, prune):
            found = torch.zeros(2**BITS, dtype=torch.int64)
            for module in family:
                score = block_scores(scores(layer.weight(module), None, prune.score), BLOCKS[prune.pattern])
                index = score.float().contiguous().view(torch.int32).flatten() >> (31 - BITS)
                found += torch.bincount(index, minlength=2**BITS)
            counts[pattern_of(family[0])] = found
    every = torch.stack(list(counts.values())).sum(0)
    drop = round(prune.sparsity * int(every.sum()))
    edge = int(torch.searchsorted(every.cumsum(0), drop))  # the bin in which the threshold lies
    within = (drop - int(every[:edge].sum())) / max(int(every[edge]), 1)
    shares = tuple(
        (name, min((int(c[:edge].sum()) + within * int(c[edge])) / int(c.sum()), MOST))
        for name, c in counts.items()
    )
    return replace(prune, scope="family", shares=(*prune.shares, *shares))


def pattern_of(module: str) -> str:
    """The fnmatch pattern of a module's family."""
    pieces = module.split(".")
    return ".".join(
        "*" if before == "experts" else p for before, p in zip(["", *pieces], pieces, strict=False)
    )
