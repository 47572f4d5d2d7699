"""The fleet's configuration: frozen dataclasses, read from a YAML file with a section per field."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.policy_config import PolicyConfig
from farthing.fleet.signals.dialects import dialect
from farthing.reader import read


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
