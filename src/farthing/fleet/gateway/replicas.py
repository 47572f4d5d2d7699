"""Replicas with their health, circuit breaker and load, and the choice among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.gateway.prefix import PrefixIndex
from farthing.prompts import Prompt

if TYPE_CHECKING:
    from farthing.fleet.gateway.active import Active


@dataclass
class Breaker:
    """Stops sending to a failing replica, and retries it with one request after a pause that doubles."""

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
        """Whether a request may be sent now; only one at a time while half open."""
        return not self.open or (self.clock() >= self._open_until and not self._trial)

    def sent(self) -> None:
        """Record a sent request. While half open it is the trial."""
        self._trial = self.open

    def succeeded(self) -> None:
        self.failures, self._pause, self._trial = 0, 0.0, False

    def abandoned(self) -> None:
        """The request ended without a verdict on the replica (the client disconnected)."""
        self._trial = False

    def failed(self) -> None:
        self.failures += 1
        self._trial = False
        if self.failures >= self.failures_to_open:
            self._open()

    def trip(self) -> None:
        """Open immediately, regardless of the number of failures."""
        self.failures += 1
        self._trial = False
        self._open()

    def _open(self) -> None:
        self._pause = min(self.max_s, self._pause * 2) if self._pause else self.open_s
        self._open_until = self.clock() + self._pause


@dataclass(frozen=True)
class Others:
    """Load of a replica from other gateways and direct requests, by its last digest."""

    requests: int = 0  # running and waiting
    queued: float = 0.0  # estimated bytes of waiting prompt text


@dataclass(eq=False)
class Replica:
    """A replica and its state."""

    name: str
    url: str  # "http://127.0.0.1:8001"
    breaker: Breaker
    healthy: bool = False
    draining: bool = False
    failed_checks: int = 0
    served: int = 0
    failed: int = 0
    active: set[Active] = field(default_factory=set)  # in-flight requests
    inflight: int = 0
    queued: int = 0  # bytes of prompt text of streams without a first byte
    others: Others = Others()
    heard: float = 0.0  # loop time of the last byte of any answer

    @property
    def queue(self) -> float:
        """Bytes of prompt text to compute first."""
        return self.queued + self.others.queued

    @property
    def load(self) -> int:
        """Requests in flight."""
        return self.inflight + self.others.requests

    def report(self, requests: int, queued: float) -> None:
        """Update from a digest's load; the excess over our own requests is others'."""
        self.others = Others(max(0, requests - self.inflight), max(0.0, queued - self.queued))

    @property
    def available(self) -> bool:
        return self.healthy and not self.draining and self.breaker.allows()

    def checked(self, ok: bool, unhealthy_after: int) -> None:
        """Record one health check."""
        self.failed_checks = 0 if ok else self.failed_checks + 1
        if ok:
            self.healthy = True
        elif self.failed_checks >= unhealthy_after:
            self.healthy = False


def make_replica(name: str, url: str, config: GatewayConfig) -> Replica:
    """Create a replica. Raises ValueError unless `url` is http://HOST:PORT."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ValueError(f"replica {name}: url {url!r}; expected http://HOST:PORT")
    breaker = Breaker(config.breaker_failures, config.breaker_open_s, config.breaker_max_s)
    return Replica(name, url.rstrip("/"), breaker)


class Balancer:
    """The set of replicas and the choice among them."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.replicas: dict[str, Replica] = {}
        self._leaving: list[Replica] = []
        self.prefixes = PrefixIndex(config.prefix_entries)

    def update(self, wanted: dict[str, str]) -> list[Replica]:
        """Set the replicas to {name: url}; omitted ones drain. Returns the new ones."""
        new = []
        for name, url in wanted.items():
            known = self.replicas.get(name)
            if known is None or known.url != url.rstrip("/"):
                made = make_replica(name, url, self.config)
                if known is not None:
                    self._remove(known)
                self.replicas[name] = made
                new.append(made)
            else:
                known.draining = False
        for replica in [r for name, r in self.replicas.items() if name not in wanted]:
            self._remove(replica)
        return new

    def _remove(self, replica: Replica) -> None:
        """Stop sending new requests; those in flight continue."""
        replica.draining = True
        self._leaving = [r for r in self._leaving if r.active] + [replica]
        del self.replicas[replica.name]
        self.prefixes.forget(replica.name)

    @property
    def everyone(self) -> list[Replica]:
        """All replicas, including draining ones with requests left."""
        return [*self.replicas.values(), *self._leaving]

    def candidates(self, tried: Sequence[Replica] = ()) -> list[Replica]:
        """The available replicas not yet tried."""
        return [r for r in self.replicas.values() if r not in tried and r.available]

    def choose(self, prompt: Prompt, tried: Sequence[Replica] = ()) -> Replica | None:
        """The replica for a request, or None if no untried one is available."""
        candidates = self.candidates(tried)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        held = self.prefixes.held(prompt.blocks)
        return min(candidates, key=lambda r: (self._cost(r, prompt, held.get(r.name, 0)), r.served))

    def _cost(self, replica: Replica, prompt: Prompt, depth: int) -> float:
        """Cost of a request on a replica that has its first `depth` blocks cached, in bytes of prompt text.

        The queue delays only this request. Uncached text delays it and all later ones, so it has a weight.
        """
        uncached = self.uncached(prompt, depth)
        running = replica.load * self.config.request_weight
        return replica.queue + running + self.config.uncached_weight * uncached

    def uncached(self, prompt: Prompt, depth: int) -> int:
        """Bytes of the prompt after its first `depth` blocks."""
        return max(0, prompt.size - depth * self.config.prefix_block)

    def learn(self, prompt: Prompt, replica: Replica) -> int:
        """Record where a request is sent. Returns the bytes that the replica must compute for it."""
        depth = self.prefixes.held(prompt.blocks).get(replica.name, 0)
        if len(self.replicas) > 1:
            self.prefixes.learn(prompt.blocks, replica.name)
        return self.uncached(prompt, depth)
