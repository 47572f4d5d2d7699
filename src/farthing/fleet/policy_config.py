"""The knobs of the policy, checked: an error names the field, its value and what is accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from farthing.fleet.decisions import Level

LATENCY_METRICS = ("queue_time", "ttft", "none")
COUNTS = ("ready", "current")
UNITS = ("requests", "tokens")
LEVELS: tuple[Level, ...] = ("short", "mid", "realtime")


@dataclass(frozen=True)
class PolicyConfig:
    """The knobs of the policy. The defaults are the documented rule, `stabilized()` its 5-minute variant."""

    capacity: float  # load units a second one replica sustains within its latency targets
    unit: str = "requests"  # of the load and the capacity: "requests" or "tokens"
    target_utilization: float = 0.7
    scale_down_below: float = 0.6  # down only when required < this · current; 1.0 switches the rule off
    stabilization_s: float = 0.0  # down only to the largest `required` of this window; 0 or 300
    min_replicas: int = 1
    max_replicas: int = 1000
    max_step: int | None = None  # replicas one decision may add or remove
    cooldown_s: float = 0.0  # no scale-down within this time after any change
    interval_s: float = 15.0  # time between decisions
    cold_start_s: float = 600.0  # launch to ready, where the signals do not know better
    short_quantile: float = 0.9  # of the short-term forecast, matched to the SLO
    mid_quantile: float = 0.5  # of the day plan, which is a floor
    levels: tuple[Level, ...] = LEVELS
    latency_metric: str = "queue_time"  # or "ttft", or "none" to switch the latency rule off
    latency_threshold_s: float = 0.2
    latency_for_s: float = 30.0
    latency_factor: float = 1.5
    latency_of: str = "ready"  # what the factor multiplies: replicas that serve, or all "current" ones
    drain_s: float = (
        60.0  # a backlog shall be worked off in this time, or in a cold start where that is longer
    )
    stale_after_s: float = 60.0  # signals older than this count as missing

    def __post_init__(self) -> None:
        positive = ("capacity", "interval_s", "latency_threshold_s", "drain_s", "stale_after_s")
        for name in positive:
            _check(
                name,
                getattr(self, name),
                "a number above 0",
                _finite(getattr(self, name)) and getattr(self, name) > 0,
            )
        for name in ("stabilization_s", "cooldown_s", "cold_start_s", "latency_for_s"):
            _check(
                name,
                getattr(self, name),
                "seconds, 0 or more",
                _finite(getattr(self, name)) and getattr(self, name) >= 0,
            )
        _check("unit", self.unit, f"one of {UNITS}", self.unit in UNITS)
        _check("target_utilization", self.target_utilization, "in (0, 1]", 0 < self.target_utilization <= 1)
        _check("scale_down_below", self.scale_down_below, "in (0, 1]", 0 < self.scale_down_below <= 1)
        _check("min_replicas", self.min_replicas, "0 or more", self.min_replicas >= 0)
        _check(
            "max_replicas",
            self.max_replicas,
            "at least min_replicas",
            self.max_replicas >= max(1, self.min_replicas),
        )
        _check("max_step", self.max_step, "1 or more, or none", self.max_step is None or self.max_step >= 1)
        for name in ("short_quantile", "mid_quantile"):
            _check(name, getattr(self, name), "in [0.5, 0.99]", 0.5 <= getattr(self, name) <= 0.99)
        _check(
            "levels", self.levels, f"some of {LEVELS}", bool(self.levels) and set(self.levels) <= set(LEVELS)
        )
        _check(
            "latency_metric",
            self.latency_metric,
            f"one of {LATENCY_METRICS}",
            self.latency_metric in LATENCY_METRICS,
        )
        _check("latency_of", self.latency_of, f"one of {COUNTS}", self.latency_of in COUNTS)
        _check("latency_factor", self.latency_factor, "above 1", self.latency_factor > 1)

    def stabilized(self, window_s: float = 300.0) -> PolicyConfig:
        """The variant with a window for the 0.6 rule: down to the largest `required` of 5 minutes."""
        return replace(self, scale_down_below=1.0, stabilization_s=window_s)


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _check(name: str, value: object, accepted: str, good: bool) -> None:
    if not good:
        raise ValueError(f"PolicyConfig.{name} = {value!r}: expected {accepted}")
