"""One threshold over the whole model, as the share of every family that falls below it.

The checkpoint is read one layer at a time, keeping a histogram per family. Scores are positive floats, whose
bits sort like their values; the first 17 bits after the sign resolve 1 in 512.
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
    """`prune` with its 'global' scope converted to shares per family; experts of a layer still compete.

    No family loses more than MOST; the excess is not taken from others.
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
    edge = int(torch.searchsorted(every.cumsum(0), drop))  # bin of the threshold
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
