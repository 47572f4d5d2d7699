"""The recent load as features of the learned forecasters.

Shapes: n = steps of the grid, F = features, W = length of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from farthing_fleet.forecast.base import Floats

FAST_S = 60.0  # windows of the two means that smooth the load: the slow one, unless
SLOW_S = 180.0  # the fast one departs from it by more than DEPART
DEPART = 0.06


def trailing_mean(values: Floats, steps: int) -> Floats:
    """The mean of the last `steps` rows, fewer at the start."""
    total = np.cumsum(np.concatenate([np.zeros_like(values[:1]), values]), axis=0)
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - max(1, steps))
    return np.asarray(((total[last] - total[first]).T / (last - first)).T, dtype=np.float64)


def trailing_max(values: Floats, steps: int) -> Floats:
    """The maximum of the last `steps` rows, by doubling: O(N log steps)."""
    steps = max(1, min(steps, len(values)))
    out, width = values.copy(), 1
    while width < steps:
        shift = min(width, steps - width)
        out[shift:] = np.maximum(out[shift:], out[:-shift].copy())
        width += shift
    return out


def trailing_slope(values: Floats, steps: int, step_s: float) -> Floats:
    """[n] least-squares slope per second over the last `steps` values; the first is repeated before it."""
    if steps < 2:
        return np.zeros_like(values)
    offset = np.arange(steps) - (steps - 1) / 2
    weight = offset / ((offset**2).sum() * step_s)
    return np.convolve(np.pad(values, (steps - 1, 0), mode="edge"), weight[::-1], mode="valid")


def steady_load(raw: Floats, step_s: float) -> Floats:
    """[n] the smoothed load: the slow mean, or the fast one where they differ much."""
    fast = trailing_mean(raw, round(FAST_S / step_s))
    slow = trailing_mean(raw, round(SLOW_S / step_s))
    return np.where(np.abs(fast - slow) > DEPART * slow, fast, slow)


QUANTILES = (0.5, 0.9)
MEANS = (0.2, 0.5, 1, 2, 3, 4.5, 6, 9, 12, 18, 24, 36, 72, 144)  # windows of trailing means, in leads
SLOPES = (0.5, 1.0, 2.0)
PEAKS = (1, 3, 6, 18, 144)
NOISE = 6  # window of the step-to-step noise, in leads
FEATURES = len(MEANS) + len(SLOPES) + len(PEAKS) + 2
SEQUENCE = 24  # values of half a lead each
LARGEST = 2.0  # logarithms are clipped to this
TINY = 1e-6  # a load up to this is no traffic: one request in eleven days


@dataclass(frozen=True)
class History:
    """Loads [n] on a grid of `step_s`, to be forecast over `lead_s`.

    Times are in *leads* (one cold start plus one interval), so that one model works for cold starts of a
    minute or an hour. Loads are logarithms relative to the current level, so that scale does not matter. The
    target is y = log(peak of the load within the next lead / current level).

    Row t of an array uses nothing after step t.
    """

    load: Floats
    step_s: float
    lead_s: float

    def __len__(self) -> int:
        return len(self.load)

    @property
    def lead(self) -> int:
        """Steps of a lead, at least 1."""
        return max(1, round(self.lead_s / self.step_s))

    @cached_property
    def level(self) -> Floats:
        """[n] the smoothed load; `TINY` without traffic, never zero."""
        return np.maximum(steady_load(self.load, self.step_s), TINY)

    @cached_property
    def target(self) -> Floats:
        """[n - lead] y of every origin with a known outcome."""
        peak = trailing_max(self.load, self.lead)[self.lead :]
        y = np.log(np.maximum(peak, TINY) / self.level[: -self.lead])
        return np.asarray(np.clip(y, -LARGEST, LARGEST), dtype=np.float64)

    def tail(self, steps: int) -> History:
        """The last `steps` steps."""
        return replace(self, load=self.load[max(0, len(self) - steps) :])

    def _steps(self, leads: float) -> int:
        return max(1, round(leads * self.lead))

    @cached_property
    def features(self) -> Floats:
        """[n, F]: logarithms of trailing means and peaks over the level, slopes, noise, the lead."""
        level = self.level
        columns = [_log(trailing_mean(self.load, self._steps(w)) / level) for w in MEANS]
        for leads in SLOPES:
            slope = trailing_slope(self.load, self._steps(leads), 1.0)
            columns.append(slope * self.lead / level)
        columns += [_log(trailing_max(level, self._steps(w)) / level) for w in PEAKS]
        jumps = np.abs(np.diff(self.load, axis=0, prepend=self.load[:1])) / level
        columns.append(np.sqrt(trailing_mean(jumps, self._steps(NOISE))))
        columns.append(np.full(level.shape, np.log2(self.lead) / 3))
        return np.clip(np.stack(columns, axis=-1), -LARGEST, LARGEST)

    @cached_property
    def sequences(self) -> Floats:
        """[n, W, 2]: the last W means over half a lead, relative to the level, and their differences."""
        width = max(1, self.lead // 2)
        means = trailing_mean(self.load, width)
        reach = SEQUENCE * width
        windows = sliding_window_view(np.pad(means, (reach, 0), mode="edge"), reach + 1)[:, ::width]
        relative = np.clip(_log(windows / self.level[:, None]), -LARGEST, LARGEST)  # [n, W + 1]
        return np.stack([relative[:, 1:], 5 * np.diff(relative, axis=1)], axis=-1)


def _log(ratio: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(ratio, TINY)), dtype=np.float64)
