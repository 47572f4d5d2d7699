"""The fleet's configuration: frozen dataclasses, read from a YAML file with a section per field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from farthing.files import read
from farthing_fleet.forecast.base import Floats
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.signals import dialect
from farthing_fleet.types import Level

Number = TypeVar("Number", float, Floats)


@dataclass(frozen=True)
class SloConfig:
    """Targets of the service, and the speed of the adjustment.

    After every interval log u moves by gain · (budget - late share). While all requests are in time it rises
    slowly; a breach lowers it at once; over time the late share approaches the budget. Ten minutes with every
    request late lower u by 14 %; recovering takes three and a half days without a late request.
    """

    target: float = 0.995  # share of the requests that meet both times below
    ttft_s: float = 2.0  # to the first token, including queueing
    tpot_s: float | None = None  # per output token; None: ignored
    lowest: float = 0.5  # bounds of the utilization
    highest: float = 0.9
    gain: float = 0.015  # per minute with all requests late
    spent: float = 0.4  # target share of the error budget to spend

    def __post_init__(self) -> None:
        _check_slo("target", self.target, "in (0, 1)", 0 < self.target < 1)
        _check_slo("ttft_s", self.ttft_s, "a number above 0", self.ttft_s > 0)
        _check_slo("tpot_s", self.tpot_s, "a number above 0, or none", self.tpot_s is None or self.tpot_s > 0)
        _check_slo("lowest", self.lowest, "in (0, highest]", 0 < self.lowest <= self.highest)
        _check_slo("highest", self.highest, "in [lowest, 1]", self.highest <= 1)
        _check_slo("gain", self.gain, "a number above 0", self.gain > 0)
        _check_slo("spent", self.spent, "in (0, 1]", 0 < self.spent <= 1)

    def moved(self, utilization: Number, late: Number, passed_s: float) -> Number:
        """The utilization after `passed_s` seconds with the share `late` of the requests late."""
        drift = self.gain * passed_s / 60 * (self.spent * (1 - self.target) - late)
        mapped = np.clip(utilization * np.exp(drift), self.lowest, self.highest)
        return mapped if isinstance(utilization, np.ndarray) else float(mapped)  # type: ignore[return-value]


def _check_slo(name: str, value: object, accepted: str, good: bool) -> None:
    if not good:
        raise ValueError(f"policy.slo.{name}: got {value!r}; expected {accepted}")


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


@dataclass(frozen=True)
class SignalsConfig:
    """Source of the signals: a Prometheus server, or the /metrics of listed replicas."""

    prometheus: str | None = None  # URL of the server
    selector: str = ""  # {label="value",…} appended to every metric name
    metrics: str = "auto"  # farthing, vllm, sglang
    replicas: tuple[str, ...] = ()  # base URLs, without Prometheus
    window_s: float = 30.0  # of rates and means; at least two scrapes of Prometheus
    timeout_s: float = 3.0
    leaving: str | None = None  # PromQL: replicas with a preemption notice (spot)
    token_file: Path | None = None  # file of the bearer token for Prometheus

    def __post_init__(self) -> None:
        dialect(self.metrics)
        for name in ("window_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"signals.{name}: got {getattr(self, name)}; expected a number of seconds above 0"
                )


@dataclass(frozen=True)
class KubernetesConfig:
    """The API server and the scaled resources."""

    api: str = "auto"  # the pod's service account (outside a pod: the kubeconfig), or a URL
    context: str | None = None
    namespace: str | None = None  # default: the pod's own
    target: str | None = None  # KIND/NAME: deployment, statefulset, leaderworkerset
    patch: bool = True  # False: only read, for an HPA or KEDA that scales
    lease: str | None = "farthing-fleet"  # None: no election, for a single controller
    identity: str | None = None  # default: the host name (the pod's name)


@dataclass(frozen=True)
class ExternalMetricsConfig:
    """The external-metrics API server for an HPA."""

    certificate: Path
    key: Path
    host: str = "0.0.0.0"
    port: int = 6443
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KedaConfig:
    """The KEDA external scaler."""

    address: str = "0.0.0.0:6000"

    def __post_init__(self) -> None:
        split_address(self.address, "keda.address")


@dataclass(frozen=True)
class FleetConfig:
    """The configuration of a controller."""

    policy: PolicyConfig
    signals: SignalsConfig = field(default_factory=SignalsConfig)
    kubernetes: KubernetesConfig | None = None
    external_metrics: ExternalMetricsConfig | None = None
    keda: KedaConfig | None = None
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    state: Path = Path("runs/fleet")  # decision log, policy state, forecasters
    metrics: str = "127.0.0.1:9400"  # HOST:PORT of the controller's own /metrics; port 0 picks a free one
    advise: bool = False  # only recommend
    forecast: dict[str, Any] = field(default_factory=dict)  # forecasters, events and holidays

    def __post_init__(self) -> None:
        split_address(self.metrics, "metrics")


def split_address(text: str, field: str = "address") -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises ValueError with the field."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{field}: got {text!r}; expected HOST:PORT")
    return host, int(port)


def load(path: Path) -> FleetConfig:
    """Read a YAML file. Raises ValueError with the file, field, value and accepted values."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as problem:
        raise ValueError(f"{path}: {problem.strerror}") from problem
    except yaml.YAMLError as problem:
        raise ValueError(f"{path} is not YAML: {problem}") from problem
    try:
        return read(FleetConfig, data)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem


# The configuration of a local fleet: defaults, overridden by a YAML file, overridden by the command line.

# A local replica is ready in seconds, so intervals are seconds here; a cluster uses quarter minutes.
_LOCAL = {
    "interval_s": 1.0,
    "cold_start_s": 5.0,
    "latency_for_s": 2.0,
    "stale_after_s": 10.0,
    "drain_s": 5.0,
    "stabilization_s": 60.0,
    "cooldown_s": 60.0,
}


def local_fleet(
    path: Path | None,
    *,
    policy: Mapping[str, Any],
    metrics_names: str,
    state: Path,
    metrics: str,
    advise: bool,
) -> FleetConfig:
    """Build the configuration. Raises ValueError with the invalid field."""
    if path is not None:
        loaded = load(path)
        return replace(loaded, state=state, metrics=metrics, advise=advise or loaded.advise)
    return FleetConfig(
        policy=PolicyConfig(**{**_LOCAL, **policy}),
        signals=SignalsConfig(metrics=metrics_names, window_s=5.0, timeout_s=2.0),
        state=state,
        metrics=metrics,
        advise=advise,
    )
