"""The oracle: the cheapest fleet that knows the future exactly but still pays for cold starts.

d_t = max(1, ceil(trailing 60 s rate / (u·C))). For each level k, the k-th replica is needed during on = {t:
d_t >= k}. It costs its busy time, plus for every gap the smaller of the gap and the load time (keep it, or
stop and relaunch it in time), plus one load time if it is first needed after the start. The total is the sum
over levels.
"""

from __future__ import annotations

import numpy as np

from farthing.fleet.replay.rate import Floats, Ints, trailing_mean


def demand(load: Floats, dt: float, capacity: float, utilization: float) -> Ints:
    """[N, B] replicas needed at every step for `load` [N, B], from the trailing 60 s rate."""
    rate = trailing_mean(load, round(60 / dt))
    return np.maximum(1, np.ceil(rate / (utilization * capacity) - 1e-9)).astype(np.int64)


def cost_hours(wanted: Ints, dt: float, load_time_s: float) -> float:
    """Instance-hours of one lane's demand [N]."""
    total = 0.0
    for level in range(1, int(wanted.max()) + 1):
        on = (wanted >= level).astype(np.int8)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], on, [0]])))
        begins, ends = edges[::2], edges[1::2]
        gaps = (begins[1:] - ends[:-1]) * dt
        total += on.sum() * dt + np.minimum(gaps, load_time_s).sum()
        total += load_time_s if begins[0] > 0 else 0.0
    return total / 3600


def oracle_hours(load: Floats, dt: float, capacity: float, utilization: float, load_time_s: float) -> Floats:
    """[B] instance-hours of the oracle for `load` [N, B]."""
    wanted = demand(load, dt, capacity, utilization)
    return np.array([cost_hours(wanted[:, lane], dt, load_time_s) for lane in range(wanted.shape[1])])
