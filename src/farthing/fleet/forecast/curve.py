"""A forecast for the policy and the dashboard: a curve of quantiles."""

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
    """A quantile forecast on a grid: value i applies to [start + i·step_s, start + (i+1)·step_s).

    The short-term forecaster returns one or a few steps, the day plan 24 hours. `skill` is the running value
    of 1 - error / error of the last value; below zero the forecaster is replaced, and `source` names the
    replacement.
    """

    start: float
    step_s: float
    p50: tuple[float, ...]
    p90: tuple[float, ...]
    source: str
    skill: float | None = None
    note: str = ""  # for instance "lstm replaced by last-value: running skill -0.12"
    weight: float | None = None  # of `source` in a mixture of forecasters

    def __post_init__(self) -> None:
        if len(self.p50) != len(self.p90) or not self.p50:
            raise ValueError(
                f"Forecast: p50, p90 have lengths {len(self.p50)}, {len(self.p90)}; expected equal and >= 1"
            )
        if not self.step_s > 0:
            raise ValueError(f"Forecast.step_s: got {self.step_s}; expected a positive number of seconds")
        if not all(math.isfinite(v) and v >= 0 for v in (*self.p50, *self.p90)):
            raise ValueError("Forecast: expected finite p50 and p90 >= 0")

    @property
    def end(self) -> float:
        return self.start + self.step_s * len(self.p50)

    def peak(self, begin: float, end: float, quantile: float = 0.9) -> float | None:
        """The largest value over [begin, end] at `quantile`; None outside the forecast.

        Quantiles other than 0.5 and 0.9 are interpolated linearly.
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
    """Write the current forecasts for the dashboard, atomically."""
    found = {name: asdict(f) for name, f in (("short", short), ("mid", mid)) if f is not None}
    replace_text(path, json.dumps({"unit": unit, "forecasts": found}), durable=False)


def read_forecasts(path: Path) -> tuple[str, dict[str, Any]]:
    """(unit, {level: forecast}) as written by `write_forecasts`; ("requests", {}) if there are none."""
    try:
        data = json.loads(path.read_text())
        return str(data["unit"]), dict(data["forecasts"])
    except (OSError, ValueError, KeyError):
        return "requests", {}
