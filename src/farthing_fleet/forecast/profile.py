"""The weekly profile: the usual load at this hour of the week, holidays, and today's departure from it.

The profile is the median of the same time over the last weeks, so that one odd day (a holiday, an outage)
does not recur a week later. The remainder, in logarithms, is forecast by one ridge regression per step
ahead: on its last values, its means over hours and days, and the same time of earlier days and weeks. A
holiday borrows the profile of a Sunday, a bridge day that of a Saturday, to a degree learned by the same
regression. With less than four weeks of history the profile is daily.

Shapes: n = steps of the history and the days after it, R = rows of a regression, F = features.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farthing_fleet.forecast.base import DAY_S, Floats, Series

# Days that differ from their weekday: public holidays, the days around them, and scheduled events.

Days = NDArray[np.int64]  # days since the epoch
ONE = timedelta(days=1)
FRIDAY, SATURDAY, SUNDAY = 4, 5, 6  # weekdays, Monday is 0


@dataclass(frozen=True)
class Event:
    """A scheduled event: all its dates (ISO), and the number of affected days around each."""

    name: str
    dates: tuple[str, ...]  # "2026-11-27", past dates to learn from and future ones to forecast
    days_before: int = 0
    days_after: int = 0

    def __post_init__(self) -> None:
        for text in self.dates:
            try:
                datetime.fromisoformat(text)
            except ValueError as error:
                raise ValueError(f"Event {self.name!r}: date {text!r}: expected YYYY-MM-DD") from error

    def days(self) -> set[date]:
        first = [datetime.fromisoformat(text).date() for text in self.dates]
        return {day + ONE * k for day in first for k in range(-self.days_before, self.days_after + 1)}


@dataclass(frozen=True)
class Calendar:
    """Kinds of special days on a grid; all masks are [n] bool."""

    days: Days  # [n] day of each step
    weekday: Days  # [n]
    second: NDArray[np.float64]  # [n] of the day
    holiday: NDArray[np.bool_]
    bridge: NDArray[np.bool_]  # a working day between a holiday and the weekend
    eve: NDArray[np.bool_]  # the day before a holiday
    after: NDArray[np.bool_]  # the day after one
    events: tuple[NDArray[np.bool_], ...]  # one mask per event

    @property
    def special(self) -> NDArray[np.bool_]:
        """[n] days that are not representative of their weekday."""
        masks = (self.holiday, self.bridge, self.eve, self.after, *self.events)
        return np.asarray(np.any(masks, axis=0), dtype=np.bool_)


def calendar(
    start: float, step_s: float, steps: int, country: str | None, events: tuple[Event, ...] = ()
) -> Calendar:
    """The calendar of `steps` steps from `start` (seconds since the epoch, in the load's own time zone).

    Raises ValueError for a country unknown to the library `holidays`.
    """
    times = start + step_s * np.arange(steps, dtype=np.float64)
    days = (times // DAY_S).astype(np.int64)
    weekday = (days + 3) % 7  # the epoch was a Thursday
    dates = [datetime.fromtimestamp(float(d) * DAY_S, UTC).date() for d in range(days[0] - 2, days[-1] + 3)]
    free = public_holidays(country, dates) if country else set()
    bridge = {
        day
        for day in dates
        if day not in free
        and ((day.weekday() == FRIDAY and day - ONE in free) or (day.weekday() == 0 and day + ONE in free))
    }

    def mask(chosen: set[date]) -> NDArray[np.bool_]:
        hit = np.array([day in chosen for day in dates], dtype=np.bool_)
        return np.asarray(hit[days - days[0] + 2], dtype=np.bool_)

    return Calendar(
        days,
        weekday,
        times % DAY_S,
        holiday=mask(free),
        bridge=mask(bridge),
        eve=mask({day - ONE for day in free} - free),
        after=mask({day + ONE for day in free} - free),
        events=tuple(mask(event.days()) for event in events),
    )


def public_holidays(country: str, dates: list[date]) -> set[date]:
    """The public holidays of `country` among `dates`. Raises ValueError for an unknown country."""
    import holidays

    years = sorted({day.year for day in dates})
    try:
        calendar: Any = holidays.country_holidays(country, years=years)
    except NotImplementedError as error:
        raise ValueError(f"country {country!r}: expected an ISO code such as US or DE") from error
    return {day for day in dates if day in calendar}


HOUR_S = 3600.0
MEANS_S = (3 * HOUR_S, 6 * HOUR_S, 12 * HOUR_S, DAY_S, 3 * DAY_S, 7 * DAY_S)
LAGS_D = (1, 2, 3, 7, 14)  # days before the target
LARGEST = 1.0  # departures are clipped to this (a factor of e) in training
MAX_ROWS = 6000  # per regression; longer histories are thinned
EVENING_S = 18 * HOUR_S  # when the eve of a holiday begins
AHEAD_DAYS = 9  # maximum forecast beyond the fitted series

Steps = NDArray[np.int64]


HOLIDAY_PENALTY = 10.0  # weaker than `penalty`, since holidays are few


@dataclass(frozen=True)
class ProfileConfig:
    """History length of the profile and strength of the regression."""

    periods: int = 5  # weeks (or days) whose median is the profile
    recent: int = 2  # number of last departures used as features
    neighbors: int = 0  # steps on either side of a seasonal lag used as features
    penalty: float = 300.0
    country: str | None = None  # of the public holidays
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class _Logs:
    """The data known at one time, by step from the start of the series into the days ahead."""

    period: int  # steps
    near: int  # steps of an hour, at least 1
    day: int  # steps
    profile: Floats  # [n] logarithms
    departure: Floats  # [known so far]
    special: Floats  # [n, S] features of holidays and events
    config: ProfileConfig

    @property
    def first(self) -> int:
        """The first step with (nearly) all features known."""
        return 2 * self.period

    def features(self, origins: Steps, ahead: int) -> Floats:
        """[R, F] for forecasts `ahead` steps ahead, using the steps before `origins` [R]."""
        past, near = self.departure, self.near
        total = np.concatenate([[0.0], np.cumsum(past)])
        target = origins + ahead - 1

        def mean(begin: Steps, end: Steps) -> Floats:
            begin = np.maximum(begin, 0)
            return np.asarray((total[end] - total[begin]) / np.maximum(end - begin, 1), dtype=np.float64)

        columns = [past[origins - 1 - k] for k in range(self.config.recent)]
        columns += [mean(origins - max(1, round(m / DAY_S * self.day)), origins) for m in MEANS_S]
        for days in LAGS_D:
            lag = days * self.day
            if lag > self.first:
                break
            shifts = range(-self.config.neighbors, self.config.neighbors + 1)
            columns += [past[np.maximum(target - lag + k, 0)] for k in shifts if lag - k >= ahead]
            if lag - near > ahead:
                columns.append(mean(target - lag - near, target - lag + near + 1))
        return np.column_stack([*columns, self.special[target]])

    def with_values(self, logs: Floats) -> _Logs:
        """The same with `logs` [m] known."""
        new = logs[len(self.departure) :] - self.profile[len(self.departure) : len(logs)]
        return replace(self, departure=np.concatenate([self.departure, _bounded(new)]))


class ProfileAR:
    """The profile forecaster (see module); forecasts up to nine days beyond the fitted series."""

    def __init__(self, config: ProfileConfig | None = None) -> None:
        self.config = config or ProfileConfig()
        self.name = f"profile{self.config.periods}"
        self._history: _Logs | None = None
        self._logs: Floats = np.zeros(0)
        self._weights: dict[int, Floats] = {}

    def fit(self, series: Series) -> None:
        self._logs, self._weights = np.log1p(series.values), {}
        self._history = _know(series, self.config) if len(series) >= 3 * series.per_day else None

    @property
    def ready(self) -> bool:
        """Whether the fitted series was long enough to learn from."""
        return self._history is not None

    def predict(self, values: Floats, steps: int) -> Floats:
        """[steps]; repeats the last value with less than three days of history."""
        if self._history is None:  # not ready
            return np.full(steps, values[-1])
        if len(values) + steps > len(self._history.profile):
            raise ValueError(
                f"ProfileAR: {steps} steps after {len(values)}; fitted at {len(self._logs)}, at most "
                f"{AHEAD_DAYS} days beyond it"
            )
        fitted = self._history.with_values(np.log1p(values))
        origin, out = np.array([len(values)]), np.empty(steps)
        for ahead in range(1, steps + 1):
            if ahead not in self._weights:
                self._weights[ahead] = self._fitted(ahead)
            moved = fitted.features(origin, ahead)[0] @ self._weights[ahead]
            out[ahead - 1] = fitted.profile[len(values) + ahead - 1] + moved
        return np.asarray(np.expm1(np.clip(out, 0.0, 50.0)), dtype=np.float64)

    def _fitted(self, ahead: int) -> Floats:
        """[F] weights of a forecast `ahead` steps ahead; large loads count more, as in the WAPE."""
        series, config = self._history, self.config
        assert series is not None
        origins = np.arange(series.first, len(self._logs) - ahead + 1)
        origins = origins[:: -max(1, -(-len(origins) // MAX_ROWS))][::-1]
        rows, target = series.features(origins, ahead), origins + ahead - 1
        if not len(rows):  # nothing to learn from: the profile alone
            return np.zeros(rows.shape[1])
        truth, load = series.departure[target], np.expm1(self._logs[target])
        weight = (load / max(load.mean(), 1e-9))[:, None]
        plain = rows.shape[1] - series.special.shape[1]
        spread = np.ones(rows.shape[1])
        spread[:plain] = rows[:, :plain].std(axis=0) + 1e-9
        penalty = np.full(rows.shape[1], HOLIDAY_PENALTY)
        penalty[:plain] = config.penalty
        scaled = rows / spread
        gram = (scaled * weight).T @ scaled + np.diag(penalty)
        return np.asarray(np.linalg.solve(gram, (scaled * weight).T @ truth) / spread, dtype=np.float64)


def _know(series: Series, config: ProfileConfig) -> _Logs:
    day, n = series.per_day, len(series) + AHEAD_DAYS * series.per_day
    weekly = len(series) >= 28 * day
    period = 7 * day if weekly else day
    days = calendar(series.start, series.step_s, n, config.country, config.events)
    logs = np.log1p(series.values)
    masked = np.where(days.special[: len(logs)], np.nan, logs) if weekly else logs
    back = [period * k for k in range(1, config.periods + 1)]
    profile = _median(masked, np.full(n, 0), back)
    profile = np.where(np.isnan(profile), _median(logs, np.full(n, 0), back), profile)
    profile[: len(logs)] = np.where(np.isnan(profile[: len(logs)]), logs, profile[: len(logs)])
    for step in np.flatnonzero(np.isnan(profile)):  # further ahead than `back` reaches: one period earlier
        profile[step] = profile[step - period]
    special = _special(masked, profile, back, days) if weekly else np.zeros((n, 0))
    departure = _bounded(logs - profile[: len(logs)])
    return _Logs(period, max(1, round(HOUR_S / series.step_s)), day, profile, departure, special, config)


def _median(logs: Floats, shift: Steps, back: list[int]) -> Floats:
    """[n] median of the values `shift` [n] + `back` steps earlier; ignores unknown ones (NaN)."""
    at = np.arange(len(shift)) - shift
    rows = np.full((len(back), len(shift)), np.nan)
    for row, steps in zip(rows, back, strict=True):
        source = at - steps
        good = (source >= 0) & (source < len(logs))
        row[good] = logs[source[good]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all unknown: NaN
        return np.asarray(np.nanmedian(rows, axis=0), dtype=np.float64)


def _special(masked: Floats, profile: Floats, back: list[int], days: Calendar) -> Floats:
    """[n, S]: difference to a borrowed Sunday's (Saturday's) profile, and markers of special days."""
    day = back[0] // 7

    def borrowed(weekday: int, where: NDArray[np.bool_]) -> Floats:
        shift = ((days.weekday - weekday) % 7) * day  # back to that weekday
        other = _median(masked, shift, [0, *back[:-1]])
        return np.where(where & (shift > 0) & ~np.isnan(other), other - profile, 0.0)

    evening = days.eve & (days.second >= EVENING_S)
    marks = [days.holiday, days.bridge, evening, *days.events]
    columns = [
        borrowed(SUNDAY, days.holiday),
        borrowed(SATURDAY, days.bridge),
        borrowed(SATURDAY, days.eve),
        *(mark.astype(np.float64) for mark in marks),
    ]
    return np.stack(columns, axis=1)


def _bounded(departure: Floats) -> Floats:
    return np.clip(departure, -LARGEST, LARGEST)
