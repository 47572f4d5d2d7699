"""Several `/scale` targets, one per replica variant: the target becomes the cheapest mix of variants.

The policy counts in replicas of size 1; `current` is the variants' total in that unit. Only the leader of the
election, held by the first target, writes.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence

from farthing.fleet.actuators.scale import ScalePatch
from farthing.fleet.decisions import Decision
from farthing.fleet.variants import Variant, settled_mix

log = logging.getLogger(__name__)


class MixedScale:
    """The actuator; `targets` correspond to `variants` in order."""

    def __init__(
        self, variants: Sequence[Variant], targets: Sequence[ScalePatch], spot_share: float = 1.0
    ) -> None:
        if len(variants) != len(targets) or not variants:
            raise ValueError(
                f"MixedScale: {len(variants)} variants, {len(targets)} targets; expected equal numbers"
            )
        self.variants, self.targets, self.spot_share = list(variants), list(targets), spot_share

    async def start(self) -> None:
        await self.targets[0].start()

    async def current(self) -> int:
        """The variants' total in whole replicas of size 1. Raises ActuatorError."""
        counts = await self._counts()
        return math.floor(sum(v.size * counts[v.name] for v in self.variants) + 1e-9)

    async def apply(self, decision: Decision) -> None:
        """Patch every variant whose count changes. Raises ActuatorError at the first failure."""
        elector = self.targets[0].elector
        if decision.target == decision.current or (elector is not None and not elector.leading):
            return
        counts = await self._counts()
        mix = settled_mix(self.variants, counts, float(decision.target), self.spot_share)
        grown = sorted(self.targets, key=lambda t: self._change(t, mix, counts), reverse=True)
        for target in grown:  # launch before removing
            variant = self.variants[self.targets.index(target)]
            if mix[variant.name] != counts[variant.name]:
                await target.set(mix[variant.name])
                log.info("%s: %d -> %d", variant.name, counts[variant.name], mix[variant.name])

    async def close(self) -> None:
        await self.targets[0].close()

    def _change(self, target: ScalePatch, mix: dict[str, int], counts: dict[str, int]) -> int:
        name = self.variants[self.targets.index(target)].name
        return mix[name] - counts[name]

    async def _counts(self) -> dict[str, int]:
        found = await asyncio.gather(*(target.current() for target in self.targets))
        return {variant.name: count for variant, count in zip(self.variants, found, strict=True)}
