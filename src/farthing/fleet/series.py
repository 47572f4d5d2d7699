"""A load series on a regular grid: slicing, averaging, reading."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DAY_S = 86400.0


@dataclass(frozen=True)
class Series:
    """Values at start, start + step_s, …; load units per second (or the column's unit)."""

    start: float  # seconds since the epoch, or 0 if the file has only offsets
    step_s: float
    values: Array  # [T] float64, finite, not negative
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

    @property
    def end(self) -> float:
        return self.start + self.step_s * len(self.values)

    @property
    def times(self) -> Array:
        """[T] seconds."""
        return self.start + self.step_s * np.arange(len(self.values), dtype=np.float64)

    @property
    def per_day(self) -> int:
        """Steps per day, at least 1."""
        return max(1, round(DAY_S / self.step_s))

    def head(self, steps: int) -> Series:
        return Series(self.start, self.step_s, self.values[:steps], self.name)

    def tail(self, steps: int) -> Series:
        first = max(0, len(self) - steps)
        return Series(self.start + first * self.step_s, self.step_s, self.values[first:], self.name)

    def coarse(self, factor: int) -> Series:
        """Means of groups of `factor` steps; drops the oldest incomplete group, so that the end stays."""
        if factor < 1 or factor > len(self):
            raise ValueError(f"Series.coarse: factor {factor}: expected 1 to {len(self)}")
        skip = len(self) % factor
        values = self.values[skip:].reshape(-1, factor).mean(axis=1)
        return Series(self.start + skip * self.step_s, self.step_s * factor, values, self.name)


def open_text(path: Path) -> io.TextIOWrapper:
    """A text stream of a plain or gzip file, detected by its first two bytes. Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"trace {path} does not exist")
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    raw: Any = gzip.open(path, "rb") if zipped else path.open("rb")  # noqa: SIM115
    return io.TextIOWrapper(raw, encoding="utf-8")


def seconds(text: str) -> float:
    """Seconds since the epoch of an ISO-like timestamp (fractions are truncated to microseconds)."""
    head, _, fraction = text.strip().partition(".")
    digits = "".join(c for c in fraction if c.isdigit())[:6] or "0"
    whole = datetime.fromisoformat(head)
    return (whole - datetime(1970, 1, 1)).total_seconds() + float(f"0.{digits}")


def read_series(path: str | Path) -> Series:
    """Read a rate series from CSV with columns `t_s,total_rate_rps` or `timestamp,value`, plain or gzip.

    Values of the second form are counts per step and are kept. Missing steps are interpolated linearly.
    Raises ValueError with the columns found.
    """
    path = Path(path)
    with open_text(path) as file:
        reader = csv.DictReader(file)
        names = tuple(reader.fieldnames or ())
        rows = list(reader)
    columns: tuple[tuple[str, str, Callable[[str], float]], ...] = (
        ("t_s", "total_rate_rps", float),
        ("timestamp", "value", seconds),
    )
    for when, what, parse in columns:
        if when in names and what in names:
            return _gridded(path, [(parse(row[when]), float(row[what])) for row in rows])
    found = ", ".join(names) or "none"
    raise ValueError(f"{path}: got columns {found}; expected t_s,total_rate_rps or timestamp,value")


def _gridded(path: Path, rows: list[tuple[float, float]]) -> Series:
    if len(rows) < 2:
        raise ValueError(f"{path}: got {len(rows)} rows; expected at least two")
    data = np.array(sorted(rows), dtype=np.float64)
    step = float(np.median(np.diff(data[:, 0])))
    if step <= 0:
        raise ValueError(f"{path}: times do not increase; expected one row per step")
    grid = np.arange(data[0, 0], data[-1, 0] + step / 2, step)
    return Series(float(data[0, 0]), step, np.interp(grid, data[:, 0], data[:, 1]), path.name.split(".")[0])
