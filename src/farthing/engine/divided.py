"""Prompt tokens on their way through the layers, a few layers per step.

Between these steps others decode (layered prefill, Lee et al. 2025). Compared with short chunks through every
layer, each expert computes many rows at once, and its weights are read once per prompt instead of once per
chunk.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farthing.engine.generation import Generation
from farthing.engine.runner import Step
from farthing.engine.sequence import Scheduled, Status

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Divided:
    """Planned prompt tokens and the layer that they have reached."""

    plan: list[Scheduled[Generation]]
    step: Step
    hidden: Tensor  # [T, D], the next layer's input
    layer: int = 0  # the next one
    seconds: float = 0.0  # spent so far

    @property
    def tokens(self) -> int:
        """Number of prompt tokens."""
        return self.step.starts[-1]

    @property
    def wanted(self) -> bool:
        """Whether one of the requests has not been cancelled."""
        return any(item.seq.status is not Status.FINISHED for item in self.plan)

    def waits(self, beside: Seq[Scheduled[Generation]], paused: set[str]) -> bool:
        """Whether its next layers are for a later step than that of `beside`: one of its clients pauses, or
        other prompts have used this step's time."""
        return any(item.seq.client in paused for item in self.plan) or any(item.count > 1 for item in beside)
