"""Validated settings of the policy; errors name the field, its value and accepted values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from farthing.fleet.decisions import Level
from farthing.fleet.slo import SloConfig


@dataclass(frozen=True)
class PolicyRule:
    """Settings that a rule's name selects. `farthing replay` has a policy for every rule."""

    scale_down_below: float  # down only when required < this · current; 1: always
    stabilization_s: float  # scale down only to the largest need of one cold start, and at most this long
    by_slo: bool = False  # the SLO adjusts the utilization
    scale_up_above: float = 1.0  # scale up only when the need, not rounded, > this · current
    scale_down_spare: float = 0.0  # down only when the need and this share of it fit into fewer replicas
    drains_fast: bool = True  # a backlog within drain_s at the target utilization, else within a cold start


RULES = {
    "slo": PolicyRule(0.95, 300.0, by_slo=True, scale_up_above=1.1, scale_down_spare=0.05),
    "stabilized": PolicyRule(0.95, 300.0, scale_up_above=1.1, scale_down_spare=0.05),
    "published": PolicyRule(0.6, 0.0, drains_fast=False),
}
LATENCY_METRICS = ("queue_time", "ttft", "tpot", "none")
COUNTS = ("ready", "current")
UNITS = ("requests", "tokens", "prompt_tokens", "output_tokens")  # the last two for separate pools
_SHORTEST_WINDOW_S = 180.0  # of the stabilization: shorter ones follow every ripple of the load
_PLAUSIBLE_S = 900.0  # measured cold starts up to this are always believed
LEVELS: tuple[Level, ...] = ("short", "mid", "realtime")


def window(longest_s: float, lead_s: float) -> float:
    """Seconds of the stabilization window of a rule: one cold start, between three minutes and `longest_s`.

    Keeping a replica for longer than a cold start costs more than it takes to launch it again.
    """
    return min(longest_s, max(_SHORTEST_WINDOW_S, lead_s))


@dataclass(frozen=True)
class PolicyConfig:
    """The settings of the policy.

    `rule` selects the scale-down behavior and the utilization: "slo" (down to the largest need of one cold
    start, at most five minutes, utilization adjusted by the SLO), "stabilized" (the same with a fixed
    utilization), "published" (down only below 0.6 of the current replicas, fixed utilization). The first two
    ignore changes up to 10 % up and 5 % down, which are noise, in fractions of a replica. Fields that are
    None come from the rule.
    """

    capacity: float  # load units per second of one replica within its latency targets
    unit: str = "requests"  # unit of load and capacity, see UNITS
    rule: str = "slo"
    target_utilization: float = 0.7  # the initial one if the SLO adjusts it
    slo: SloConfig = field(default_factory=SloConfig)
    scale_down_below: float | None = None  # down only when required < this · current; 1.0: always
    scale_up_above: float | None = None  # up only when the need, not rounded, > this · current; 1.0: always
    scale_down_spare: float | None = None  # down only when the need and this share of it fit into fewer
    stabilization_s: float | None = None  # window of the stabilization; None: one cold start, see `window`
    min_replicas: int = 1
    max_replicas: int = 1000
    max_step: int | None = None  # maximum replicas that one decision adds or removes
    cooldown_s: float = 0.0  # no scale-down within this time after any change
    interval_s: float = 15.0  # time between decisions
    cold_start_s: float = 600.0  # launch to ready, if the signals do not report it
    short_quantile: float = 0.9  # of the short-term forecast, chosen for the SLO
    mid_quantile: float = 0.5  # of the day plan, which is a floor
    levels: tuple[Level, ...] = LEVELS
    latency_metric: str = "queue_time"  # or "ttft", "tpot"; "none" disables the latency rule
    latency_threshold_s: float = 0.2
    latency_for_s: float = 30.0
    latency_factor: float = 1.5
    latency_of: str = "ready"  # replicas that the factor multiplies: "ready" or all "current" ones
    drain_s: float = 60.0  # target time to process a backlog
    stale_after_s: float = 60.0  # signals older than this count as missing

    def __post_init__(self) -> None:
        _check("rule", self.rule, f"one of {', '.join(RULES)}", self.rule in RULES)
        positive = ("capacity", "interval_s", "latency_threshold_s", "drain_s", "stale_after_s")
        for name in positive:
            _check(
                name,
                getattr(self, name),
                "a number above 0",
                _finite(getattr(self, name)) and getattr(self, name) > 0,
            )
        for name in ("stabilization_s", "cooldown_s", "cold_start_s", "latency_for_s"):
            value = getattr(self, name)
            good = value is None or (_finite(value) and value >= 0)
            _check(name, value, "seconds, 0 or more", good)
        _check("unit", self.unit, f"one of {UNITS}", self.unit in UNITS)
        _check("target_utilization", self.target_utilization, "in (0, 1]", 0 < self.target_utilization <= 1)
        _check("scale_down_below", self.scale_down_below, "in (0, 1]", 0 < self.down_below <= 1)
        _check("scale_up_above", self.scale_up_above, "in [1, 2]", 1 <= self.up_above <= 2)
        _check("scale_down_spare", self.scale_down_spare, "in [0, 1]", 0 <= self.down_spare <= 1)
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

    def lead_s(self, measured: float | None) -> float:
        """Seconds from launch to ready: measured, up to `longest_lead_s`; configured if there is none."""
        if measured is None or not math.isfinite(measured) or measured < 0:
            return self.cold_start_s
        return min(measured, self.longest_lead_s)

    @property
    def longest_lead_s(self) -> float:
        """Longer measurements are mistakes, for instance by a pod that failed after it was ready."""
        return max(3 * self.cold_start_s, _PLAUSIBLE_S)

    @property
    def down_below(self) -> float:
        """Scale down only when required < this · current; 1 means always."""
        below = self.scale_down_below
        return below if below is not None else RULES[self.rule].scale_down_below

    @property
    def up_above(self) -> float:
        """Scale up only when the need > this · current; 1 means always."""
        above = self.scale_up_above
        return above if above is not None else RULES[self.rule].scale_up_above

    @property
    def down_spare(self) -> float:
        """Scale down only when the need and this share of it fit into fewer replicas."""
        spare = self.scale_down_spare
        return spare if spare is not None else RULES[self.rule].scale_down_spare

    def window_s(self, lead_s: float | None = None) -> float:
        """Seconds of the stabilization window for a cold start (default: the configured); 0: none."""
        if self.stabilization_s is not None:
            return self.stabilization_s
        return window(RULES[self.rule].stabilization_s, self.cold_start_s if lead_s is None else lead_s)

    @property
    def by_slo(self) -> bool:
        """Whether the SLO adjusts the utilization."""
        return RULES[self.rule].by_slo

    @property
    def drains_fast(self) -> bool:
        """Whether a backlog is processed within `drain_s` at the target utilization."""
        return RULES[self.rule].drains_fast

    def with_rule(self, rule: str) -> PolicyConfig:
        """The same settings under another rule."""
        return replace(
            self,
            rule=rule,
            scale_down_below=None,
            scale_up_above=None,
            scale_down_spare=None,
            stabilization_s=None,
        )


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _check(name: str, value: object, accepted: str, good: bool) -> None:
    if not good:
        raise ValueError(f"policy.{name}: got {value!r}; expected {accepted}")
