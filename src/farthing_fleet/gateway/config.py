"""The gateway's settings, and the options of its command."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from farthing.config import check, option
from farthing.prompts import BLOCK


@dataclass(frozen=True)
class GatewayConfig:
    """Settings of a gateway. Times in seconds, sizes in bytes.

    Raises ValueError with the field, its value and accepted values.
    """

    # Requests
    tries: int = 2  # maximum replicas per request
    wait_s: float = 300.0  # maximum wait of a request for a ready replica (a cold start)
    max_waiting: int = 2048  # maximum waiting requests
    poison_ttl_s: float = 300.0  # time for which a request that killed a replica is refused
    drain_s: float = 60.0  # maximum wait for in-flight requests at shutdown
    # Limits on clients
    max_head: int = 64 << 10
    max_body: int = 32 << 20
    max_body_total: int = 256 << 20  # total over all requests
    max_connections: int = 8192
    max_client_connections: int = 4096  # per client address; a load balancer is one address
    head_timeout_s: float = 8.0  # from the first byte (or the connection) to a complete head
    body_timeout_s: float = 30.0  # between reads of a request body
    write_timeout_s: float = 120.0  # for a client that stops reading
    keepalive_s: float = 75.0  # idle time between requests of a connection
    # Replicas
    connect_timeout_s: float = 2.0
    idle_timeout_s: float = 600.0  # maximum silence of a replica within an exchange
    health_path: str = "/health"
    health_interval_s: float = 0.5
    health_timeout_s: float = 1.0
    unhealthy_after: int = 2  # failed health checks in a row
    hung_margin_s: float = 3.0  # a replica silent for longer than the P99 TTFT plus this is hung
    breaker_failures: int = 3  # failed exchanges in a row
    breaker_open_s: float = 1.0  # first pause; doubles up to breaker_max_s
    breaker_max_s: float = 30.0
    # Choice of a replica
    request_weight: int = 2048  # cost of a request in flight, in bytes of prompt
    uncached_weight: float = 3.0  # weight of uncached prompt text, relative to queued text
    prefix_block: int = BLOCK  # bytes of prompt text per block; same as the replicas'
    prefix_blocks: int = 1024  # maximum blocks per prompt
    prefix_entries: int = 1 << 16  # maximum blocks remembered per replica
    digest_interval_s: float = 2.0  # between polls of a replica's cache digest

    def __post_init__(self) -> None:
        if not self.health_path.startswith("/"):
            raise ValueError(
                f"gateway.health_path: got {self.health_path!r}; expected a path starting with /"
            )


_option = partial(option, group="Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """A gateway and where it finds its replicas."""

    replica: tuple[str, ...] = _option((), "URL of a replica (repeatable)")
    replicas_file: Path | None = _option(None, "JSON file of replicas, reloaded on change")
    replicas_dns: tuple[str, ...] = _option(
        (), "HOST:PORT whose addresses are the replicas (a headless Service; repeatable)"
    )
    host: str = _option("127.0.0.1", "Address to listen on")
    port: int = _option(8000, "Port; 0: any free port")
    health_path: str = _option("/health", "Path that answers 200 while a replica is ready")
    api_key_file: Path | None = _option(None, "File of keys, one `name:key` or key per line")
    drain: float = _option(60.0, "Seconds for in-flight requests after SIGTERM")
    state: Path | None = _option(None, "The controller's state directory, shown on the dashboard")
    usd_per_hour: float | None = _option(None, "Price per replica-hour, for the dashboard", minimum=0)
    wake: tuple[str, ...] = _option(
        (), "URL of a controller's /wake, which starts replicas for held requests; MODEL=URL of each model"
    )
    replica_key_file: Path | None = _option(
        None, "File with a metrics key of the replicas, for their cache digests"
    )

    def __post_init__(self) -> None:
        check(self)
        if sum(map(bool, (self.replica, self.replicas_file, self.replicas_dns))) != 1:
            raise ValueError("expected one of --replica, --replicas-file and --replicas-dns")
