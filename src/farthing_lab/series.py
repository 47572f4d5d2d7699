"""Load series on a regular grid, and their files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from farthing.bench.trace import check_span, columns, csv_rows, first_line
from farthing_fleet.forecast.base import Floats

_MAX_STEPS = 10_000_000  # 19 years of minutes; bounds the memory that one wrong time allocates
_MAX_TIME_S, _MAX_VALUE = 1e11, 1e12


@dataclass(frozen=True)
class Series:
    """Values at start, start + step_s, …; load units per second (or the column's unit)."""

    start: float  # seconds since the epoch, or 0 if the file has only offsets
    step_s: float
    values: Floats  # [T] float64, finite, not negative
    name: str = "series"

    def __post_init__(self) -> None:
        if not self.step_s > 0:
            raise ValueError(f"Series.step_s: got {self.step_s}; expected a positive number of seconds")
        if self.values.ndim != 1 or len(self.values) == 0:
            raise ValueError(
                f"Series.values has shape {self.values.shape}: expected one dimension with at least one value"
            )
        bad = np.flatnonzero(~np.isfinite(self.values) | (self.values < 0))
        if bad.size:
            at = int(bad[0])
            raise ValueError(
                f"{self.name}: value {self.values[at]} at row {at}: expected a finite number >= 0"
            )

    def __len__(self) -> int:
        return len(self.values)

    def head(self, steps: int) -> Series:
        return Series(self.start, self.step_s, self.values[:steps], self.name)

    def coarse(self, factor: int) -> Series:
        """Means of groups of `factor` steps; drops the oldest incomplete group, so that the end stays."""
        if factor < 1 or factor > len(self):
            raise ValueError(f"Series.coarse: factor {factor}: expected 1 to {len(self)}")
        skip = len(self) % factor
        values = self.values[skip:].reshape(-1, factor).mean(axis=1)
        return Series(self.start + skip * self.step_s, self.step_s * factor, values, self.name)


def read_series(path: str | Path, most_s: float = math.inf) -> Series:
    """Read a rate series from CSV with columns `t_s,total_rate_rps` or `timestamp,value`, plain or gzip.

    Values of the second form are counts per step and become rates. Missing steps are interpolated linearly.
    Raises ValueError with the columns found, or with the line and field; also if it spans more than `most_s`.
    """
    path = Path(path)
    names, rows = columns(first_line(path)), list(csv_rows(path))
    if {"t_s", "total_rate_rps"} <= set(names):
        when, what = "t_s", "total_rate_rps"
        times = [row.number(when, -_MAX_TIME_S, _MAX_TIME_S) for row in rows]
    elif {"timestamp", "value"} <= set(names):
        when, what = "timestamp", "value"
        times = [row.time(when) for row in rows]
    else:
        accepted = ", ".join(names) or "none"
        raise ValueError(f"{path}: got columns {accepted}; expected t_s,total_rate_rps or timestamp,value")
    values = [row.number(what, 0, _MAX_VALUE) for row in rows]
    if len(rows) < 2:
        raise ValueError(f"{path}: got {len(rows)} rows; expected at least two")
    data = np.array(sorted(zip(times, values, strict=True)), dtype=np.float64)
    step = float(np.median(np.diff(data[:, 0])))
    if step <= 0:
        raise ValueError(f"{path}: times do not increase; expected one row per step")
    check_span(path, when, times, [row.line for row in rows], min(most_s, _MAX_STEPS * step))
    grid = np.arange(data[0, 0], data[-1, 0] + step / 2, step)
    found = np.interp(grid, data[:, 0], data[:, 1]) / (1.0 if what == "total_rate_rps" else step)
    return Series(float(data[0, 0]), step, found, path.name.split(".")[0])
