"""Days that differ from their weekday: public holidays, the days around them, and scheduled events."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farthing.fleet.series import DAY_S

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
        known: Any = holidays.country_holidays(country, years=years)
    except NotImplementedError as error:
        raise ValueError(f"country {country!r}: expected an ISO code such as US or DE") from error
    return {day for day in dates if day in known}
