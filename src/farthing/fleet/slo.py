"""The utilization that meets the SLO, adjusted by the measured share of late requests, within bounds.

After every interval log u moves by gain · (budget - late share). While all requests are in time it rises
slowly; a breach lowers it at once; over time the late share approaches the budget. Ten minutes with every
request late lower u by 14 %; recovering takes three and a half days without a late request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from farthing.fleet.forecast.base import Floats

Number = TypeVar("Number", float, Floats)


@dataclass(frozen=True)
class SloConfig:
    """Targets of the service, and the speed of the adjustment."""

    target: float = 0.995  # share of the requests that meet both times below
    ttft_s: float = 2.0  # to the first token, including queueing
    tpot_s: float | None = None  # per output token; None: ignored
    lowest: float = 0.5  # bounds of the utilization
    highest: float = 0.9
    gain: float = 0.015  # per minute with all requests late
    spent: float = 0.4  # target share of the error budget to spend

    def __post_init__(self) -> None:
        _check("target", self.target, "in (0, 1)", 0 < self.target < 1)
        _check("ttft_s", self.ttft_s, "a number above 0", self.ttft_s > 0)
        _check("tpot_s", self.tpot_s, "a number above 0, or none", self.tpot_s is None or self.tpot_s > 0)
        _check("lowest", self.lowest, "in (0, highest]", 0 < self.lowest <= self.highest)
        _check("highest", self.highest, "in [lowest, 1]", self.highest <= 1)
        _check("gain", self.gain, "a number above 0", self.gain > 0)
        _check("spent", self.spent, "in (0, 1]", 0 < self.spent <= 1)

    def moved(self, utilization: Number, late: Number, passed_s: float) -> Number:
        """The utilization after `passed_s` seconds with the share `late` of the requests late."""
        drift = self.gain * passed_s / 60 * (self.spent * (1 - self.target) - late)
        made = np.clip(utilization * np.exp(drift), self.lowest, self.highest)
        return made if isinstance(utilization, np.ndarray) else float(made)  # type: ignore[return-value]


def _check(name: str, value: object, accepted: str, good: bool) -> None:
    if not good:
        raise ValueError(f"policy.slo.{name}: got {value!r}; expected {accepted}")
