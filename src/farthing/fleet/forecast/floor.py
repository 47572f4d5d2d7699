"""How much of a day plan is worth having as a floor, by what it would have cost and saved lately.

The short-term bound answers for the next cold start already. A floor above it costs replicas on every day
on which the plan is too high, and saves only where the load outgrows the bound. So the floor is that share
of the plan that would have lost least over the last days: a unit of load too much counts once, one too
little ten times.

Shapes: S = shares tried, n = judgements.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from farthing.fleet.forecast.base import Floats

SHARES = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])  # [S]; never less than half of the plan
SHORTAGE = 10.0  # a unit of load without a replica, against a unit of replicas without load
FIRST_SHARE = 1.0  # before anything was judged the plan is believed


def floor_losses(planned: Floats, bound: Floats, truth: Floats) -> Floats:
    """[n, S] loss of each share for planned, short-term bound and true peaks of the load, all [n]."""
    offered = np.maximum(bound[:, None], planned[:, None] * SHARES)
    missed = truth[:, None] - offered
    return np.asarray(np.where(missed > 0, SHORTAGE * missed, -missed), dtype=np.float64)


def best_share(losses: Floats) -> float:
    """The share with the smallest sum of `losses` [n, S]; of equal ones the smallest."""
    if not len(losses):
        return FIRST_SHARE
    return float(SHARES[int(np.argmin(losses.sum(axis=0).round(9)))])


class FloorShare:
    """The share, learnt as it goes."""

    def __init__(self, window: int) -> None:
        self._losses: deque[Floats] = deque(maxlen=window)
        self.share = FIRST_SHARE

    def learn(self, planned: float, bound: float, truth: float) -> None:
        """Take in one peak that was planned and bounded, and what came."""
        self._losses.append(floor_losses(*(np.array([x]) for x in (planned, bound, truth)))[0])

    def settle(self) -> float:
        """Choose anew; once a day is often enough, so that the floor does not flutter."""
        self.share = best_share(np.array(self._losses).reshape(-1, len(SHARES)))
        return self.share
