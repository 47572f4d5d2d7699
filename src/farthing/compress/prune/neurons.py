"""Choose the neurons of a gated MLP to drop, by the energy they add to the output."""

from __future__ import annotations

import torch
from torch import Tensor


def neuron_scores(down: Tensor, energy: Tensor) -> Tensor:
    """E[a_i^2] ||down_i||^2, [I]: down [D, I], energy [I] of its input."""
    return energy * down.square().sum(0)


def choose_neurons(score: Tensor, keep: int) -> list[int]:
    """Ids of the `keep` best, ascending."""
    if not 1 <= keep <= len(score):
        raise ValueError(f"keep: got {keep}; expected 1 to {len(score)} neurons")
    return [int(i) for i in score.topk(keep).indices.sort().values]


def kept_neurons(width: int, share: float, multiple: int = 16) -> int:
    """Neurons left after dropping about `share`, rounded to a multiple of `multiple`."""
    if not 0 <= share < 1:
        raise ValueError(f"neurons: got {share}; expected a share in [0, 1)")
    kept = max(multiple, round(width * (1 - share) / multiple) * multiple)
    return min(kept, width)


def slice_mlp(gate: Tensor, up: Tensor, down: Tensor, keep: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The MLP with only the neurons `keep`."""
    index = torch.tensor(keep)
    return gate[index], up[index], down[:, index]
