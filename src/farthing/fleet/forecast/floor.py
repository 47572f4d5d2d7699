"""The share of a day plan to use as a floor, by its recent cost and savings.

The short-term bound already covers the next cold start. A floor above it costs replicas every day, and helps
only when the load exceeds what the bound's replicas can carry, which is more than the bound, because they are
provisioned at a target utilization. The floor is therefore the share of the plan with the least loss over the
last days: a unit of load provisioned above the bound counts once, a unit that could not be carried ten times.

Shapes: S = shares tried, n = judgements.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from farthing.fleet.forecast.base import Floats

SHARES = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])  # [S]; never less than half of the plan
SHORTAGE = 10.0  # cost of a unit of load without capacity, relative to a unit of idle capacity
FIRST_SHARE = 1.0  # use the whole plan before any judgement


def floor_losses(planned: Floats, bound: Floats, truth: Floats, utilization: float) -> Floats:
    """[n, S] loss of each share for planned, short-term bound and true peaks of the load, all [n]."""
    offered = np.maximum(bound[:, None], planned[:, None] * SHARES)
    missed = np.maximum(0.0, truth[:, None] - offered / utilization)
    return np.asarray(offered - bound[:, None] + SHORTAGE * missed, dtype=np.float64)


def best_share(losses: Floats) -> float:
    """The share with the smallest sum of `losses` [n, S]; ties go to the smallest share."""
    if not len(losses):
        return FIRST_SHARE
    return float(SHARES[int(np.argmin(losses.sum(axis=0).round(9)))])


class FloorShare:
    """The share, learned online."""

    def __init__(self, window: int, utilization: float = 0.7) -> None:
        self.utilization = utilization
        self._losses: deque[Floats] = deque(maxlen=window)
        self.share = FIRST_SHARE

    def learn(self, planned: float, bound: float, truth: float) -> None:
        """Add one planned peak, its bound and the true peak."""
        losses = floor_losses(np.array([planned]), np.array([bound]), np.array([truth]), self.utilization)
        self._losses.append(losses[0])

    def settle(self) -> float:
        """Choose the share again; call once a day so that the floor does not oscillate."""
        self.share = best_share(np.array(self._losses).reshape(-1, len(SHARES)))
        return self.share
