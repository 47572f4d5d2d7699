"""The fleet's configuration: frozen dataclasses, read from a YAML file with a section per field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import yaml

from farthing.files import read
from farthing_fleet.gateway.config import GatewayConfig as GatewayConfig  # for those who import the others
from farthing_fleet.signals import dialect
from farthing_fleet.types import Snapshot


@dataclass(frozen=True)
class SloConfig:
    """Targets of the service."""

    target: float = 0.995  # share of the requests that meet both times below
    ttft_s: float = 2.0  # to the first token, including queueing
    tpot_s: float | None = None  # per output token; None: ignored

    def __post_init__(self) -> None:
        _check("slo.target", self.target, "in (0, 1)", 0 < self.target < 1)
        _check("slo.ttft_s", self.ttft_s, "a number above 0", self.ttft_s > 0)
        tpot_s = self.tpot_s
        _check("slo.tpot_s", tpot_s, "a number above 0, or none", tpot_s is None or tpot_s > 0)


RULES = ("rehearsed", "published", "lstm", "regression", "prophet")
LATENCY_METRICS = ("queue_time", "ttft", "tpot", "none")
UNITS = ("requests", "tokens")
_PLAUSIBLE_S = 900.0  # measured cold starts up to this are always believed


@dataclass(frozen=True)
class PolicyConfig:
    """The settings of the policy."""

    capacity: float  # load units per second of one replica within its latency targets
    unit: str = "requests"  # unit of load and capacity, see UNITS
    rule: str = "rehearsed"  # what orders replicas, see RULES; the last three are forecasters
    target_utilization: float = 0.7  # of forecasters, and until a load has been observed
    slo: SloConfig = field(default_factory=SloConfig)
    min_replicas: int = 1
    max_replicas: int = 1000
    cooldown_s: float = 0.0  # no scale-down within this time after any change
    interval_s: float = 15.0  # time between decisions
    cold_start_s: float = 600.0  # launch to ready, if the signals do not report it
    latency_metric: str = "queue_time"  # or "ttft", "tpot": no scale-down without it; "none": none is needed
    latency_threshold_s: float = 0.2  # of queue times that mean saturation, and of `published`
    drain_s: float = 60.0  # target time to process a backlog
    stale_after_s: float = 60.0  # signals older than this count as missing

    def __post_init__(self) -> None:
        positive = ("capacity", "interval_s", "latency_threshold_s", "drain_s", "stale_after_s")
        for name in positive:
            value = getattr(self, name)
            _check(name, value, "a number above 0", math.isfinite(value) and value > 0)
        for name in ("cooldown_s", "cold_start_s"):
            value = getattr(self, name)
            _check(name, value, "seconds, 0 or more", math.isfinite(value) and value >= 0)
        _check("unit", self.unit, f"one of {UNITS}", self.unit in UNITS)
        _check("target_utilization", self.target_utilization, "in (0, 1]", 0 < self.target_utilization <= 1)
        _check("min_replicas", self.min_replicas, "0 or more", self.min_replicas >= 0)
        most, metric = self.max_replicas, self.latency_metric
        _check("max_replicas", most, "at least min_replicas", most >= max(1, self.min_replicas))
        _check("latency_metric", metric, f"one of {LATENCY_METRICS}", metric in LATENCY_METRICS)
        _check("rule", self.rule, f"one of {RULES}", self.rule in RULES)

    def lead_s(self, measured: float | None) -> float:
        """Seconds from launch to ready: measured, up to `longest_lead_s`; configured if there is none."""
        if measured is None or not math.isfinite(measured) or measured < 0:
            return self.cold_start_s
        return min(measured, self.longest_lead_s)

    def latency(self, snapshot: Snapshot) -> float | None:
        """The mean time of `latency_metric`, if measured."""
        metric = self.latency_metric
        return getattr(snapshot, f"{metric}_s") if metric != "none" else None

    @property
    def longest_lead_s(self) -> float:
        """Longer measurements are mistakes, for instance by a pod that failed after it was ready."""
        return max(3 * self.cold_start_s, _PLAUSIBLE_S)


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
    patch: bool = True  # False: only read, for KEDA
    lease: str | None = "farthing-fleet"  # None: no election, for a single controller
    identity: str | None = None  # default: the host name (the pod's name)


@dataclass(frozen=True)
class FleetConfig:
    """The configuration of a controller."""

    policy: PolicyConfig
    signals: SignalsConfig = field(default_factory=SignalsConfig)
    kubernetes: KubernetesConfig | None = None
    state: Path = Path("runs/fleet")  # decision log, policy state, forecasters
    metrics: str = "127.0.0.1:9400"  # HOST:PORT of the controller's own /metrics; port 0 picks a free one
    advise: bool = False  # only recommend
    forecast: dict[str, Any] = field(default_factory=dict)  # forecasters, events and holidays
    models: dict[str, Any] = field(default_factory=dict)  # of `fleet up`: fields of `policy`, by model

    def __post_init__(self) -> None:
        split_address(self.metrics, "metrics")

    def of(self, model: str) -> FleetConfig:
        """The configuration of one of several models. Raises ValueError with an invalid field of `models`."""
        own = {**asdict(self.policy), **(self.models.get(model) or {})}
        try:
            made = replace(self, policy=read(PolicyConfig, own), state=self.state / model, models={})
            return made.checked()
        except ValueError as problem:
            raise ValueError(f"models.{model}: {problem}") from problem

    def checked(self) -> Self:
        """Itself. Raises ValueError if a rehearsal, which starts with a day of steps, would take minutes."""
        interval_s = self.policy.interval_s
        _check("interval_s", interval_s, "1 or more seconds", interval_s >= 1)
        return self


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
        return read(FleetConfig, data).checked()
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem


# A local replica is ready in seconds, so intervals are seconds here; a cluster uses quarter minutes.
_LOCAL = {
    "interval_s": 1.0,
    "cold_start_s": 5.0,
    "stale_after_s": 10.0,
    "drain_s": 5.0,
    "cooldown_s": 60.0,
}


def make_fleet(
    path: Path | None, policy: Mapping[str, Any], *, advise: bool = False, **fields: Any
) -> FleetConfig:
    """The configuration of a fleet that a command starts: the fields that are set, over those of the file.

    Raises ValueError with the invalid field.
    """
    fleet = load(path) if path is not None else FleetConfig(PolicyConfig(capacity=1.0, max_replicas=2))
    given = {name: value for name, value in fields.items() if value is not None}
    return replace(fleet, policy=replace(fleet.policy, **policy), advise=advise or fleet.advise, **given)


def local_fleet(
    path: Path | None, policy: Mapping[str, Any], *, metrics_names: str, **fields: Any
) -> FleetConfig:
    """The same for `farthing fleet up`, where intervals are seconds without a file."""
    if path is None:
        policy = {**_LOCAL, **policy}
        fields["signals"] = SignalsConfig(metrics=metrics_names, window_s=5.0, timeout_s=2.0)
    return make_fleet(path, policy, **fields)
