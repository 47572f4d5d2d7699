"""The recent load as features, and how far it exceeds a point forecast within a cold start.

A policy with a cold start of L seconds needs a bound on the *peak* of the load within the next L seconds,
not on a single value. The growth of the peak over the forecast is observed,

    g(t) = max load over (t - L, t]  /  point forecast made at t - L,

and its q-quantile over a trailing window widens the current forecast. This is split-conformal prediction
with a moving window: coverage follows the data, whatever the point forecast. Three properties of service
loads bound it: the load reverts to its recent mean, a steep slope continues for a while, and records are
rare (`ceiling`).

Shapes: N = steps of the grid, B = runs side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from farthing_fleet.forecast.base import Floats

LEAD_S = 615.0  # the windows below are for this lead: a cold start of ten minutes


QUANTILE = 0.9  # of the growths within
WINDOW_S = 86_400.0
PRIOR = 1.25  # growth assumed before any observation
REVERSION = 0.2  # weight of the recent mean in the point forecast
REVERSION_S = 3_600.0  # window of that mean
TREND = 0.2  # share of the cold start for which a steep slope continues
TREND_S = 300.0  # window of the slope
TREND_ABOVE = 0.25  # a slope is steep if it changes the load by this share in
TREND_OVER_S = 600.0  # this time
FAST_S = 60.0  # windows of the two means that smooth the load: the slow one, unless
SLOW_S = 180.0  # the fast one departs from it by more than DEPART
DEPART = 0.06
CEILING = 0.8  # bounds stay below this times the highest recent load
CEILING_S = 172_800.0  # window of the highest load
CEILING_AFTER_S = 21_600.0  # before this much history, the ceiling is
CEILING_EARLY = 2.0  # this times the highest load
REFRESH_S = 600.0  # time between computations of the quantile
MEMORY_LEAST = 3.0  # leads for which a load that collapses is expected back, and once a load
MEMORY_S = 1_800.0  # came back after longer than that: this time,
MEMORY_MOST = 24.0  # at most this many leads,
MEMORY_SEEN_S = 21_600.0  # until none has for this long
COLLAPSE = 0.3  # a collapse: the load is below this share of its highest in that time


def pace_of(lead_s: float) -> float:
    """The factor of windows for a short lead: they shrink with it, since load is watched more closely."""
    return min(1.0, lead_s / LEAD_S)


def trailing_mean(values: Floats, steps: int) -> Floats:
    """[N, B] mean of the last `steps` rows, fewer at the start."""
    total = np.cumsum(np.concatenate([np.zeros((1, values.shape[1])), values]), axis=0)
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - max(1, steps))
    return np.asarray((total[last] - total[first]) / (last - first)[:, None], dtype=np.float64)


def trailing_max(values: Floats, steps: int) -> Floats:
    """[N, B] maximum of the last `steps` rows, by doubling: O(N log steps)."""
    steps = max(1, min(steps, len(values)))
    out, width = values.copy(), 1
    while width < steps:
        shift = min(width, steps - width)
        out[shift:] = np.maximum(out[shift:], out[:-shift].copy())
        width += shift
    return out


def trailing_slope(values: Floats, steps: int, step_s: float) -> Floats:
    """[N, B] least-squares slope per second over the last `steps` rows; the first row is repeated before the
    start.
    """
    if steps < 2:
        return np.zeros_like(values)
    offset = np.arange(steps) - (steps - 1) / 2
    weight = offset / ((offset**2).sum() * step_s)
    padded = np.concatenate([np.repeat(values[:1], steps - 1, axis=0), values])
    columns = [np.convolve(padded[:, lane], weight[::-1], mode="valid") for lane in range(values.shape[1])]
    return np.stack(columns, axis=1)


def steady_load(raw: Floats, step_s: float, pace: float) -> Floats:
    """[N, B] the smoothed load: the slow mean, or the fast one where they differ much."""
    fast = trailing_mean(raw, round(pace * FAST_S / step_s))
    slow = trailing_mean(raw, round(pace * SLOW_S / step_s))
    return np.where(np.abs(fast - slow) > DEPART * slow, fast, slow)


def point_forecast(raw: Floats, load: Floats, step_s: float, lead_s: float, pace: float) -> Floats:
    """[N, B] a model-free forecast: the last value, moved towards the recent mean and along a steep slope."""
    mean = trailing_mean(load, round(pace * REVERSION_S / step_s))
    point = (1 - REVERSION) * load + REVERSION * mean
    slope = trailing_slope(raw, round(pace * TREND_S / step_s), step_s)
    steep = np.abs(slope) * pace * TREND_OVER_S > TREND_ABOVE * load
    moved = point + np.where(steep, TREND * slope * lead_s, 0.0)
    return np.maximum(moved, 0.5 * load)


def growth_bound(load: Floats, point: Floats, step_s: float, lead_s: float, pace: float) -> Floats:
    """[N, B] upper bound on the peak of the load within `lead_s`, from what is known at each step.

    `load` [N, B] is observed, `point` [N, B] the forecast made at each step. Nothing of a later step enters.
    """
    lead = max(1, round(lead_s / step_s))
    growth = np.full(load.shape, PRIOR)
    if lead < len(load):
        peaks = trailing_max(load, lead)
        growth[lead:] = peaks[lead:] / np.maximum(point[:-lead], 1e-9)
    bound = point * running_quantile(growth, step_s, QUANTILE, pace * WINDOW_S, PRIOR, pace * REFRESH_S)
    return np.asarray(np.maximum(bound, load), dtype=np.float64)


def running_quantile(
    seen: Floats, step_s: float, quantile: float, window_s: float, prior: float, refresh_s: float
) -> Floats:
    """[N, B] quantile of `seen` over the trailing window, refreshed every `refresh_s`.

    `prior` stands for what has not been seen yet.
    """
    stride = max(1, round(refresh_s / (10 * step_s)))  # neighboring steps are nearly equal
    sparse = seen[::stride]
    window = max(1, round(window_s / (step_s * stride)))
    filled = np.concatenate([np.full((window - 1, seen.shape[1]), prior), sparse])
    windows = sliding_window_view(filled, window, axis=0)  # [n, B, window]
    every = max(1, round(refresh_s / (step_s * stride)))
    at = np.arange(0, len(sparse), every)
    rank = min(window - 1, int(np.ceil(quantile * window)) - 1)
    out = np.empty((len(at), seen.shape[1]))
    for begin in range(0, len(at), 256):
        rows = windows[at[begin : begin + 256]]
        out[begin : begin + 256] = np.partition(rows, rank, axis=-1)[..., rank]
    return np.repeat(out, every * stride, axis=0)[: len(seen)]


def ceiling(load: Floats, step_s: float) -> Floats:
    """[N, B] a share of the highest five-minute mean remembered; a multiple of the highest load until enough
    has been seen.
    """
    smooth = trailing_mean(load, max(1, round(300 / step_s)))
    highest = trailing_max(smooth, round(CEILING_S / step_s)) * CEILING
    early = min(len(load), round(CEILING_AFTER_S / step_s))
    highest[:early] = CEILING_EARLY * trailing_max(load[:early], early)
    return highest


def returning(load: Floats, step_s: float, lead_s: float) -> Floats:
    """[N, B] the load before a collapse, while it is remembered; 0 without a collapse.

    Forecasts are relative to the current load, so after a gap in the traffic they are near zero. The memory
    is long only where loads are known to return late: elsewhere it costs replicas and gains nothing.
    """
    least = round(MEMORY_LEAST * max(1, round(lead_s / step_s)))
    most = max(least, round(min(MEMORY_S, MEMORY_MOST * lead_s) / step_s))
    highest, longest = trailing_max(load, least), trailing_max(load, most)
    returned = np.zeros_like(load)  # 1 where a load is back that only the long memory remembers
    before = load[:-1]
    forgotten = (before < COLLAPSE * longest[:-1]) & (before >= COLLAPSE * highest[:-1])
    returned[1:] = forgotten & (load[1:] >= COLLAPSE * longest[:-1])
    seen = trailing_max(returned, round(MEMORY_SEEN_S / step_s)) > 0
    highest = np.where(seen, longest, highest)
    return np.where(load < COLLAPSE * highest, highest, 0.0)


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
    """Loads [n, B] on a grid of `step_s`, to be forecast over `lead_s`.

    Times are in *leads* (one cold start plus one interval), so that one model works for cold starts of a
    minute or an hour. Loads are logarithms relative to the current level, so that scale does not matter. The
    target is y = log(peak of the load within the next lead / current level).

    Shapes: n = steps of the grid, B = parallel runs (1 in production), F = features, W = length of a
    sequence. Row t uses nothing after step t.
    """

    load: Floats
    step_s: float
    lead_s: float
    start: int = 0  # steps before the first row
    pace: float = 1.0  # see `pace_of`

    def __len__(self) -> int:
        return len(self.load)

    @property
    def lead(self) -> int:
        """Steps of a lead, at least 1."""
        return max(1, round(self.lead_s / self.step_s))

    @cached_property
    def level(self) -> Floats:
        """[n, B] the smoothed load; `TINY` without traffic, never zero."""
        return np.maximum(steady_load(self.load, self.step_s, self.pace), TINY)

    @cached_property
    def target(self) -> Floats:
        """[n - lead, B] y of every origin with a known outcome."""
        peak = trailing_max(self.load, self.lead)[self.lead :]
        y = np.log(np.maximum(peak, TINY) / self.level[: -self.lead])
        return np.asarray(np.clip(y, -LARGEST, LARGEST), dtype=np.float64)

    def tail(self, steps: int) -> History:
        """The last `steps` steps."""
        first = max(0, len(self) - steps)
        return replace(self, load=self.load[first:], start=self.start + first)

    def head(self, steps: int) -> History:
        """The first `steps` steps."""
        return replace(self, load=self.load[:steps])

    def lane(self, index: int) -> History:
        """One run."""
        return replace(self, load=self.load[:, index : index + 1])

    def _steps(self, leads: float) -> int:
        return max(1, round(leads * self.lead))

    @cached_property
    def features(self) -> Floats:
        """[n, B, F]: logarithms of trailing means and peaks over the level, slopes, noise, the lead."""
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
        """[n, B, W, 2]: the last W means over half a lead, relative to the level, and their differences."""
        width = max(1, self.lead // 2)
        means = trailing_mean(self.load, width)
        reach = SEQUENCE * width
        padded = np.concatenate([np.repeat(means[:1], reach, axis=0), means])
        windows = sliding_window_view(padded, reach + 1, axis=0)[..., ::width]  # [n, B, W + 1]
        relative = np.clip(_log(windows / self.level[..., None]), -LARGEST, LARGEST)
        return np.stack([relative[..., 1:], 5 * np.diff(relative, axis=-1)], axis=-1)


def memory(history: History) -> int:
    """Number of steps before an origin that its features use."""
    return round(max(MEANS) * history.lead) + 2


def _log(ratio: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(ratio, TINY)), dtype=np.float64)
