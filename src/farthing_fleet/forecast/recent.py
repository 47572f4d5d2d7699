"""Loads to plan for, from the recent past alone: one pass, a few microseconds a step.

Every plan answers "for which load should replicas be ordered now?", and none knows how many a load needs:
`farthing_fleet.rehearsal` tries every plan with several windows and margins and chooses.

    last       the mean of the last minute
    growth     the smoothed load, moved along a steep slope, times the 0.9 quantile of how far the peak of
               the next lead exceeded such a forecast during the last day
    day        the last minute times the growth within a lead at this time of the last days
    hour       the median of what the last four hours reached from these minutes until a lead later, or the
               last minute if that is more: work that a clock starts, which no recent minute announces

A lead is one cold start and one interval. Loads and times may have any unit and any clock.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

import numpy as np

DAY_S = 86_400.0
PLANS = ("last", "growth", "day", "hour")
SAYS = {  # in a reason
    "last": "the last minute",
    "growth": "the growth of the last day",
    "day": "the growth at this time of day",
    "hour": "the same minutes of the last hours",
}

_QUANTILE = 0.9
_GROWTH = 1.25  # assumed until enough has been seen
_ENOUGH = 360  # samples of the growth
_REVERSION = 0.2  # weight of the last hour's mean
_DEPART = 0.06  # the mean of one minute replaces that of three if it departs by this share
_STEEP, _STEEP_S = 0.25, 600.0  # a slope is steep if it changes the load by this share in this time
_TREND = 0.2  # share of the lead for which a steep slope continues
_DAYS = ((1, 1.0), (2, 0.6), (3, 0.36), (7, 0.6))  # days back, and the weight of their growth
_KEPT_DAYS = 8
_HOURS = 4  # hours back
_TINY = 1e-9


class Highest:
    """The maximum of the last `steps` values."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._falling: deque[tuple[int, float]] = deque()  # later larger values make earlier ones irrelevant
        self._count = 0

    def add(self, value: float) -> float:
        """The maximum with `value`."""
        falling = self._falling
        while falling and falling[-1][1] <= value:
            falling.pop()
        falling.append((self._count, value))
        self._count += 1
        if falling[0][0] < self._count - self._steps:
            falling.popleft()
        return falling[0][1]


class Mean:
    """The mean of the last `steps` values."""

    def __init__(self, steps: int) -> None:
        self._values: deque[float] = deque(maxlen=steps)
        self._sum = 0.0
        self._exact = steps  # additions until the sums are computed again

    def add(self, value: float) -> float:
        """The mean with `value`."""
        if len(self._values) == self._values.maxlen:
            self._sum -= self._values[0]
        self._values.append(value)
        self._sum += value
        self._exact -= 1
        if not self._exact:  # else what rounding left of a load that ended would need a replica for ever
            self._exact = self._values.maxlen or 1
            self._sum = math.fsum(self._values)
        return self.value

    def reset(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._sum = 0.0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def value(self) -> float:
        """The mean; 0 without values."""
        return max(0.0, self._sum / len(self._values)) if self._values else 0.0


class _Growth:
    """The point forecast of `growth`, and the running quantile of how far the load's peak exceeded it."""

    def __init__(self, step_s: float, lead_s: float) -> None:
        def steps(seconds: float) -> int:
            return max(1, round(seconds / step_s))

        self._lead_s, self._lead = lead_s, steps(lead_s)
        self._minute, self._three, self._hour = Mean(steps(60)), Mean(steps(180)), Mean(steps(3600))
        self._recent: deque[float] = deque(maxlen=max(2, steps(300)))
        offset = np.arange(self._recent.maxlen or 2) - ((self._recent.maxlen or 2) - 1) / 2
        self._slope = offset / ((offset**2).sum() * step_s)
        self._peak = Highest(self._lead)
        self._every = steps(min(60.0, lead_s))
        self._open: deque[tuple[int, float]] = deque()  # (step, forecast) until the outcome is known
        self._seen: deque[float] = deque(maxlen=steps(DAY_S) // self._every or 1)
        self.quantile, self._count = _GROWTH, 0

    def add(self, load: float) -> float:
        """The load to plan for after `load`."""
        minute, three, hour = self._minute.add(load), self._three.add(load), self._hour.add(load)
        level = minute if abs(minute - three) > _DEPART * three else three
        self._recent.append(load)
        point = (1 - _REVERSION) * level + _REVERSION * hour
        if len(self._recent) == self._recent.maxlen:
            slope = float(self._slope @ np.fromiter(self._recent, np.float64))
            if abs(slope) * _STEEP_S > _STEEP * level:
                point += _TREND * slope * self._lead_s
        point = max(point, 0.5 * level)
        self._learn(self._peak.add(minute), point)
        return max(point * self.quantile, level)

    def _learn(self, peak: float, point: float) -> None:
        """`peak` is the highest load of the last lead."""
        if self._count % self._every == 0:
            self._open.append((self._count, max(point, _TINY)))
            while self._open[0][0] <= self._count - self._lead:
                self._seen.append(peak / self._open.popleft()[1])
            if self._count % (10 * self._every) == 0 and self._seen:
                seen = np.concatenate([self._seen, np.full(max(0, _ENOUGH - len(self._seen)), _GROWTH)])
                rank = math.ceil(_QUANTILE * len(seen)) - 1
                self.quantile = float(np.partition(seen, rank)[rank])
        self._count += 1


class _ByMinute:
    """A figure from the means of the load of which one a minute is kept, computed again with each of them."""

    def __init__(self, step_s: float, mean_s: float, kept_s: float) -> None:
        """mean_s: the time of a mean; kept_s: the time of which they are kept."""
        self._minute = max(1, round(60 / step_s))  # steps
        self._minute_s = self._minute * step_s
        self._mean = Mean(max(1, round(mean_s / step_s)))
        self._history: deque[float] = deque(maxlen=self._minutes(kept_s) + 1)
        self._value, self._count = 0.0, 0  # it is computed with the first load

    def _minutes(self, seconds: float) -> int:
        return max(1, round(seconds / self._minute_s))

    def add(self, load: float) -> float:
        """The figure after a step with this load."""
        mean = self._mean.add(load)
        if self._count % self._minute == 0:
            self._history.append(mean)
            self._value = self._computed()
        self._count += 1
        return self._value

    def _computed(self) -> float:
        raise NotImplementedError

    def _peak(self, at: int, count: int) -> float:
        return max(self._history[i] for i in range(at, min(at + count, len(self._history))))


class _Days(_ByMinute):
    """How much the load grew within a lead at this time of the last days; 1 before the second day."""

    def __init__(self, step_s: float, lead_s: float) -> None:
        super().__init__(step_s, 300.0, _KEPT_DAYS * DAY_S)
        self._day = self._minutes(DAY_S)
        self._ahead = math.ceil(lead_s / self._minute_s) + 2

    def _computed(self) -> float:
        total = weights = 0.0
        for days, weight in _DAYS:
            at = len(self._history) - 1 - days * self._day
            if at >= 0:
                growth = self._peak(at, self._ahead) / max(self._history[at], _TINY)
                total += weight * min(4.0, max(0.5, growth))
                weights += weight
        return total / weights if weights else 1.0


class _Hours(_ByMinute):
    """What the load reached within a lead from these minutes of the last hours, in the median; before the
    second hour its highest mean of a minute."""

    def __init__(self, step_s: float, lead_s: float) -> None:
        super().__init__(step_s, 60.0, 3600.0 * _HOURS)
        self._hour = self._minutes(3600.0)
        self._ahead = min(self._hour, math.ceil(lead_s / self._minute_s) + 1)

    def _computed(self) -> float:
        starts = range(len(self._history) - 1 - self._hour, -1, -self._hour)
        return median([self._peak(at, self._ahead) for at in starts] or [max(self._history)])


class RecentPlans:
    """All plans over one load, advanced step by step."""

    def __init__(self, step_s: float, lead_s: float) -> None:
        self._last = Mean(max(1, round(min(60.0, 2 * lead_s) / step_s)))
        self._growth, self._days = _Growth(step_s, lead_s), _Days(step_s, lead_s)
        self._hours = _Hours(step_s, lead_s)

    @property
    def growth(self) -> float:
        """The quantile of the growth within a lead."""
        return self._growth.quantile

    @growth.setter
    def growth(self, value: float) -> None:
        self._growth.quantile = value

    def add(self, load: float) -> tuple[float, ...]:
        """The loads to plan for after a step with the mean `load`, in the order of `PLANS`."""
        last = self._last.add(load)
        return (
            last,
            self._growth.add(load),
            last * self._days.add(load),
            max(last, self._hours.add(load)),
        )
