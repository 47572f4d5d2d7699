"""Kinds of replica (hardware, quantization, spot): the cheapest mix that carries the need.

A bounded covering problem: minimize the total price so that the sizes reach the need and the non-spot
variants reach their share of it. HiGHS solves it exactly, in milliseconds for the few variants of a fleet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

GAP = 0.005  # relative gap to the optimum at which the solver may stop
LIMIT_S = 2.0
KEPT = 1.05  # a sufficient mix is kept while it costs at most this factor of the best


@dataclass(frozen=True)
class Variant:
    """One kind of replica. `size` is its capacity relative to the policy's replica."""

    name: str
    price: float  # per hour
    size: float = 1.0
    spot: bool = False
    max_replicas: int = 1000

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("variant.name is empty; expected a name")
        for field in ("price", "size"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) > 0):
                raise ValueError(
                    f"variant {self.name}.{field}: got {getattr(self, field)}; expected a number above 0"
                )
        if self.max_replicas < 0:
            raise ValueError(f"variant {self.name}.max_replicas: got {self.max_replicas}; expected 0 or more")


Mix = dict[str, int]


def cost(variants: Sequence[Variant], mix: Mapping[str, int]) -> float:
    """Price of a mix per hour."""
    return sum(variant.price * mix.get(variant.name, 0) for variant in variants)


def carries(variants: Sequence[Variant], mix: Mapping[str, int], need: float, spot_share: float) -> bool:
    """Whether the mix reaches `need` and its non-spot variants reach their share of it."""
    total = sum(v.size * mix.get(v.name, 0) for v in variants)
    firm = sum(v.size * mix.get(v.name, 0) for v in variants if not v.spot)
    return total >= need - 1e-9 and firm >= (1 - spot_share) * need - 1e-9


def cheapest_mix(variants: Sequence[Variant], need: float, spot_share: float = 1.0) -> Mix:
    """The cheapest mix for `need` (in the policy's replicas) with at most `spot_share` of it on spot.

    If the need cannot be reached, the mix with all replicas.
    """
    most = {v.name: v.max_replicas for v in variants}
    if not carries(variants, most, need, spot_share):
        return most
    sizes = np.array([v.size for v in variants])
    firm = np.where([v.spot for v in variants], 0.0, sizes)
    solved = milp(
        [v.price for v in variants],
        constraints=LinearConstraint(np.stack([sizes, firm]), [need, (1 - spot_share) * need], np.inf),
        integrality=np.ones(len(variants)),
        bounds=Bounds(0, [v.max_replicas for v in variants]),
        options={"mip_rel_gap": GAP, "time_limit": LIMIT_S},
    )
    if solved.x is None:  # timed out without a mix: prefer too many
        return most
    return {v.name: round(count) for v, count in zip(variants, solved.x, strict=True)}


def settled_mix(variants: Sequence[Variant], current: Mix, need: float, spot_share: float = 1.0) -> Mix:
    """The cheapest mix, or the current one while it carries the need and costs little more."""
    best = cheapest_mix(variants, need, spot_share)
    allowed = all(current.get(v.name, 0) <= v.max_replicas for v in variants)
    good = allowed and carries(variants, current, need, spot_share)
    return dict(current) if good and cost(variants, current) <= KEPT * cost(variants, best) else best
