"""Choose the routed experts to drop.

REAP's saliency (Lasby et al. 2025): the mean, over the tokens routed to an expert, of its gate times the norm
of its output. Group-limited routing needs groups of equal size, so every group loses the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Number of experts to keep per layer."""

    per_group: int
    groups: int

    @property
    def kept(self) -> int:
        """Experts kept per layer."""
        return self.per_group * self.groups


def plan_experts(experts: int, share: float, groups: int, topk_groups: int, top_k: int) -> ExpertPlan:
    """Drop about `share` of the experts while top_k stays reachable. Raises ValueError if it cannot.

    Every group keeps the same number, at least two (a group's score is its two best), and the selected groups
    together keep at least top_k.
    """
    if not 0 <= share < 1:
        raise ValueError(f"experts: got {share}; expected a share in [0, 1) of routed experts to drop")
    size = experts // groups
    per_group = round(size * (1 - share))
    least = max(-(-top_k // topk_groups), min(2, size) if groups > 1 else 1)
    if per_group < least:
        raise ValueError(
            f"experts: got {share}; {per_group} of {size} experts would remain in each of {groups} groups, "
            f"but top_k = {top_k} over {topk_groups} groups needs {least}; "
            f"expected at most {1 - least / size:.3g}"
        )
    return ExpertPlan(per_group, groups)


def choose_experts(saliency: Tensor, tokens: Tensor, plan: ExpertPlan) -> list[int]:
    """Ids to keep, ascending: the most salient of every group. saliency [E] is a sum over tokens [E].

    An expert that was never selected has saliency 0 and is pruned first.
    """
    mean = torch.where(tokens > 0, saliency / tokens.clamp_min(1), torch.zeros_like(saliency))
    groups = mean.view(plan.groups, -1)
    best = groups.topk(plan.per_group, dim=1).indices.sort(1).values
    offset = torch.arange(plan.groups).unsqueeze(1) * groups.shape[1]
    return [int(i) for i in (best + offset).flatten()]
