"""Who takes a request: replicas with their health and circuit breaker, and the choice among them.

The choice is least load with prefix affinity: a request goes to the replica that served the longest
known prefix of its body, as long as that replica carries no more than `affinity_slack` requests above
the least loaded one; a prefix found in a replica's cache saves its computation, a queue in front of it
costs more than that.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from farthing.fleet.gateway.upstream import Pool


@dataclass(frozen=True)
class GatewayConfig:
    """What can be set at the gateway. Times in seconds."""

    tries: int = 3  # replicas a request is offered to before its first byte
    connect_timeout_s: float = 2.0
    idle_timeout_s: float = 600.0  # silence of a replica within an exchange
    wait_s: float = 30.0  # how long a request waits for a replica to be ready
    max_waiting: int = 1000
    max_body: int = 32 << 20  # bytes
    drain_s: float = 60.0  # how long a stop waits for requests under way
    health_interval_s: float = 1.0
    health_timeout_s: float = 5.0
    health_path: str = "/health"
    unhealthy_after: int = 3  # health checks that fail in a row
    breaker_failures: int = 3  # exchanges that fail in a row
    breaker_open_s: float = 1.0  # first pause; doubles up to breaker_max_s
    breaker_max_s: float = 30.0
    affinity_slack: int = 4  # requests above the least loaded replica
    affinity_block: int = 512  # bytes of body a prefix grows by
    affinity_blocks: int = 64  # prefixes longer than block * blocks count no more
    affinity_entries: int = 65536

    def __post_init__(self) -> None:
        for name in ("tries", "unhealthy_after", "breaker_failures", "affinity_block", "affinity_entries"):
            if getattr(self, name) < 1:
                raise ValueError(f"GatewayConfig.{name} = {getattr(self, name)}: at least 1 is needed")
        for name in (
            "connect_timeout_s",
            "idle_timeout_s",
            "health_interval_s",
            "health_timeout_s",
            "breaker_open_s",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"GatewayConfig.{name} = {getattr(self, name)}: a positive number of seconds is needed"
                )
        if not self.health_path.startswith("/"):
            raise ValueError(
                f"GatewayConfig.health_path = {self.health_path!r}: a path that begins with / is needed"
            )


@dataclass
class Breaker:
    """Stops sending to a replica that fails, and tries it again with one request after a pause that
    doubles.
    """

    failures_to_open: int
    open_s: float
    max_s: float
    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    _pause: float = 0.0
    _open_until: float = 0.0
    _trial: bool = False

    @property
    def open(self) -> bool:
        return self._pause > 0

    def allows(self) -> bool:
        """Whether a request may be sent now; while half open, only one at a time."""
        return not self.open or (self.clock() >= self._open_until and not self._trial)

    def sent(self) -> None:
        """A request goes out. While half open it is the trial."""
        self._trial = self.open

    def succeeded(self) -> None:
        self.failures, self._pause, self._trial = 0, 0.0, False

    def abandoned(self) -> None:
        """The request ended without saying anything about the replica (the client went away)."""
        self._trial = False

    def failed(self) -> None:
        self.failures += 1
        self._trial = False
        if self.failures >= self.failures_to_open:
            self._pause = min(self.max_s, self._pause * 2) if self._pause else self.open_s
            self._open_until = self.clock() + self._pause


@dataclass(eq=False)
class Replica:
    """A replica as the gateway sees it."""

    name: str
    url: str  # "http://127.0.0.1:8001"
    pool: Pool
    breaker: Breaker
    healthy: bool = False
    draining: bool = False
    failed_checks: int = 0
    inflight: int = 0
    served: int = 0
    failed: int = 0
    host: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.host = f"{self.pool.host}:{self.pool.port}".encode()

    @property
    def available(self) -> bool:
        return self.healthy and not self.draining and self.breaker.allows()

    def checked(self, ok: bool, unhealthy_after: int) -> None:
        """Take in one health check."""
        self.failed_checks = 0 if ok else self.failed_checks + 1
        if ok:
            self.healthy = True
        elif self.failed_checks >= unhealthy_after:
            self.healthy = False


def make_replica(name: str, url: str, config: GatewayConfig) -> Replica:
    """Raises ValueError unless `url` is http://HOST:PORT."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ValueError(f"replica {name}: url {url!r} is not usable: http://HOST:PORT is needed")
    pool = Pool(parts.hostname, parts.port, config.connect_timeout_s)
    breaker = Breaker(config.breaker_failures, config.breaker_open_s, config.breaker_max_s)
    return Replica(name, url.rstrip("/"), pool, breaker)


class Affinity:
    """Remembers which replica served a body's prefixes, the least recently used forgotten first."""

    def __init__(self, config: GatewayConfig) -> None:
        self._block, self._blocks, self._entries = (
            config.affinity_block,
            config.affinity_blocks,
            config.affinity_entries,
        )
        self._owners: OrderedDict[int, str] = OrderedDict()

    def prefixes(self, body: bytes) -> list[int]:
        """Hashes of the body's prefixes of one block, two blocks, …; a hash carries all before it."""
        hashes: list[int] = []
        state = 0
        for start in range(0, min(len(body), self._block * self._blocks) - self._block + 1, self._block):
            state = hash((state, body[start : start + self._block]))
            hashes.append(state)
        return hashes

    def owner(self, prefixes: list[int]) -> str | None:
        """The replica that served the longest known prefix."""
        for key in reversed(prefixes):
            if key in self._owners:
                return self._owners[key]
        return None

    def learn(self, prefixes: list[int], replica: str) -> None:
        for key in prefixes:
            self._owners[key] = replica
            self._owners.move_to_end(key)
        while len(self._owners) > self._entries:
            self._owners.popitem(last=False)


class Balancer:
    """The set of replicas and the choice among them."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.replicas: dict[str, Replica] = {}
        self._affinity = Affinity(config)

    def update(self, wanted: dict[str, str]) -> list[Replica]:
        """Take over a new set {name: url}; a replica left out drains. Returns the new ones."""
        new = []
        for name, url in wanted.items():
            known = self.replicas.get(name)
            if known is None or known.url != url.rstrip("/"):
                if known is not None:
                    self._remove(known)
                self.replicas[name] = make_replica(name, url, self.config)
                new.append(self.replicas[name])
            else:
                known.draining = False
        for replica in [r for name, r in self.replicas.items() if name not in wanted]:
            self._remove(replica)
        return new

    def _remove(self, replica: Replica) -> None:
        """No new request goes there; those under way keep their connections."""
        replica.draining = True
        replica.pool.close()
        del self.replicas[replica.name]

    def candidates(self, tried: Sequence[Replica] = ()) -> list[Replica]:
        """The available replicas not yet tried."""
        return [r for r in self.replicas.values() if r not in tried and r.available]

    def choose(self, body: bytes, tried: Sequence[Replica] = ()) -> Replica | None:
        """The replica for a request, None when no untried one is available."""
        candidates = self.candidates(tried)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        least = min(candidates, key=lambda r: (r.inflight, r.served))
        owner = self.replicas.get(self._affinity.owner(self._affinity.prefixes(body)) or "")
        if owner in candidates and owner.inflight <= least.inflight + self.config.affinity_slack:
            return owner
        return least

    def learn(self, body: bytes, replica: Replica) -> None:
        """Remember where a request goes."""
        if len(self.replicas) > 1:
            self._affinity.learn(self._affinity.prefixes(body), replica.name)
