"""A forecast as the policy and the dashboard see it: a curve of quantiles."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from farthing.files import replace_text

FORECASTS = "forecasts.json"  # in the state directory: the curves of the last decision


@dataclass(frozen=True)
class Forecast:
    """A quantile forecast on a grid: value i holds over [start + i·step_s, start + (i+1)·step_s).

    The short-term forecaster gives one or a few steps, the day plan one a step for 24 hours.
    `skill` is 1 - error / error of the last value, running; below zero the forecaster was replaced and
    `source` names what replaced it.
    """

    start: float
    step_s: float
    p50: tuple[float, ...]
    p90: tuple[float, ...]
    source: str
    skill: float | None = None
    note: str = ""  # for instance "lstm replaced by last-value: running skill -0.12"
    weight: float | None = None  # of `source` where several forecasters are mixed

    def __post_init__(self) -> None:
        if len(self.p50) != len(self.p90) or not self.p50:
            raise ValueError(
                f"Forecast: p50 and p90 need one equal length >= 1, got {len(self.p50)} and {len(self.p90)}"
            )
        if not self.step_s > 0:
            raise ValueError(f"Forecast.step_s = {self.step_s}: a positive number of seconds is needed")
        if not all(math.isfinite(v) and v >= 0 for v in (*self.p50, *self.p90)):
            raise ValueError("Forecast: p50 and p90 must be finite and not negative")

    @property
    def end(self) -> float:
        return self.start + self.step_s * len(self.p50)

    def peak(self, begin: float, end: float, quantile: float = 0.9) -> float | None:
        """The largest value over [begin, end] at `quantile`; None where the forecast says nothing.

        Quantiles 0.5 and 0.9 are as forecast, others lie on the line through them.
        """
        first = max(0, math.floor((begin - self.start) / self.step_s))
        last = min(len(self.p50) - 1, math.floor((end - self.start) / self.step_s))
        if first > last:
            return None
        weight = (quantile - 0.5) / 0.4
        return max(
            max(0.0, low + weight * (high - low))
            for low, high in zip(self.p50[first : last + 1], self.p90[first : last + 1], strict=True)
        )


def write_forecasts(path: Path, unit: str, short: Forecast | None, mid: Forecast | None) -> None:
    """Leave the forecasts of this turn for the dashboard, in one step."""
    found = {name: asdict(f) for name, f in (("short", short), ("mid", mid)) if f is not None}
    replace_text(path, json.dumps({"unit": unit, "forecasts": found}), durable=False)


def read_forecasts(path: Path) -> tuple[str, dict[str, Any]]:
    """(unit, {level: forecast}) as `write_forecasts` left them; ("requests", {}) where there are none."""
    try:
        data = json.loads(path.read_text())
        return str(data["unit"]), dict(data["forecasts"])
    except (OSError, ValueError, KeyError):
        return "requests", {}
