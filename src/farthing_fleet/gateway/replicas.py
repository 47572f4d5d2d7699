"""The replicas behind a gateway: their list, health, load and cached prompts, and the choice among them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, Literal
from urllib.parse import urlsplit

from farthing.exchange import ReplicaLost, Upstream
from farthing.prompts import Prompt
from farthing_fleet.gateway.config import GatewayConfig

# An interruptible request in flight on a replica.

Why = Literal["stopping", "hung"]


class Interrupted(Exception):
    """The exchange was interrupted: the gateway stops or the replica hangs."""

    def __init__(self, why: Why) -> None:
        super().__init__(
            "the gateway is shutting down" if why == "stopping" else "the replica stopped answering"
        )
        self.why = why


@dataclass(eq=False)
class Active:
    """One exchange with one replica."""

    streamed: bool
    began: float  # loop time
    heard: bool = False  # the replica has sent a byte
    queued: int = 0  # bytes of prompt text to compute before the first byte
    life: int = 0  # of the replica
    _task: asyncio.Task[object] | None = None
    _why: Why | None = None

    def interrupt(self, why: Why) -> None:
        """Raise Interrupted inside `interruptible`; no effect outside it."""
        if self._task is not None and self._why is None:
            self._why = why
            self._task.cancel()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A region in which `interrupt` raises Interrupted in the task that entered it."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        try:
            yield
        except asyncio.CancelledError:
            why, self._why = self._why, None
            if why is None:
                raise
            task.uncancel()
            raise Interrupted(why) from None
        finally:
            self._task = None


log = logging.getLogger(__name__)

Identity = tuple[str, str, bytes]  # method, path and query, body
_ENTRIES = 4096
_GUILTY = 2  # deaths


class Poison:
    """Deaths per request digest; the oldest entries are evicted first, and each expires after `ttl_s`.

    A replica may die of a request or of anything else, so one death proves nothing, however many requests it
    interrupts: each may be sent again. A request that was in flight at two deaths is refused, unless one
    answered it since the first.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl, self._clock = ttl_s, clock
        self._deaths: OrderedDict[bytes, tuple[frozenset[int], float]] = OrderedDict()  # (lives, expiry)

    def __len__(self) -> int:
        return len(self._deaths)

    def strike(self, identity: Identity, life: int) -> None:
        """Record that this life of a replica ended with the request in flight."""
        key = _digest(identity)
        self._deaths[key] = (self._current(key) | {life}, self._clock() + self._ttl)
        self._deaths.move_to_end(key)
        while len(self._deaths) > _ENTRIES:
            self._deaths.popitem(last=False)

    def acquit(self, identity: Identity) -> None:
        """Record that a replica answered this request: others died of something else."""
        if self._deaths:
            self._deaths.pop(_digest(identity), None)

    def refuses(self, identity: Identity) -> bool:
        """Whether this request must not be sent to another replica."""
        return bool(self._deaths) and len(self._current(_digest(identity))) >= _GUILTY

    def _current(self, key: bytes) -> frozenset[int]:
        lives, expiry = self._deaths.get(key, (frozenset(), 0.0))
        if lives and expiry <= self._clock():
            del self._deaths[key]
            return frozenset()
        return lives


def _digest(identity: Identity) -> bytes:
    method, target, body = identity
    state = blake2b(f"{method} {target}\n".encode("utf-8", "surrogateescape"), digest_size=16)
    state.update(body)
    return state.digest()


# The prompt blocks cached on each replica: reported ones, and those sent since.

_GRACE_S = 30.0  # a sent block counts as cached for this long without being in a digest: it may be queued


class PrefixIndex:
    """Blocks per replica, at most `entries` each; the least recently used are evicted first.

    A replica's published cache digest (Farthing) is authoritative. For other servers the index records what
    was sent to them and assumes a cache of `entries` blocks.
    """

    def __init__(self, entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries, self._clock = entries, clock
        self._blocks: dict[str, OrderedDict[int, float]] = {}  # replica -> block -> when it was sent

    def depths(self, blocks: Sequence[int]) -> dict[str, int]:
        """{replica: number of leading blocks cached}, omitting replicas with none."""
        counts = {}
        for replica, own in self._blocks.items():
            depth = next((i for i, block in enumerate(blocks) if block not in own), len(blocks))
            if depth:
                counts[replica] = depth
        return counts

    def learn(self, blocks: Sequence[int], replica: str) -> None:
        """Record that a request with these blocks was sent to `replica`."""
        now = self._clock()
        own = self._blocks.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # the first ones are shared most, so evict them last
            own[block] = now
            own.move_to_end(block)
        while len(own) > self._entries:
            own.popitem(last=False)

    def replace(self, replica: str, blocks: Iterable[int]) -> None:
        """Set the blocks that `replica` reports, least recently used first."""
        since = self._clock() - _GRACE_S
        own = OrderedDict.fromkeys(blocks, 0.0)
        for block, sent in self._blocks.get(replica, {}).items():
            if sent > since:
                own[block] = sent
                own.move_to_end(block)
        self._blocks[replica] = own

    def forget(self, replica: str) -> None:
        """Drop a replica that is gone."""
        self._blocks.pop(replica, None)


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


_LIVES = itertools.count()


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
    elsewhere: tuple[int, float] = (0, 0.0)  # requests and queued bytes of other gateways and clients
    entries: tuple[Mapping[str, Any], ...] = ()  # its /v1/models, as last read
    read: bool = False  # since it became healthy
    asks_for_key: bool = False  # before it lists its models
    pool: str = ""  # the model that it serves; empty if it does not say
    heard: float = 0.0  # loop time of the last byte of any answer
    life: int = field(default_factory=partial(next, _LIVES))  # another one after it died or hung

    @property
    def queue(self) -> float:
        """Bytes of prompt text to compute first."""
        return self.queued + self.elsewhere[1]

    @property
    def load(self) -> int:
        """Requests in flight."""
        return self.inflight + self.elsewhere[0]

    def report(self, requests: int, queued: float) -> None:
        """Update from a digest's load; the excess over our own requests is others'."""
        self.elsewhere = max(0, requests - self.inflight), max(0.0, queued - self.queued)

    @property
    def available(self) -> bool:
        return self.healthy and not self.draining and self.breaker.allows()

    def checked(self, ok: bool, unhealthy_after: int) -> None:
        """Record one health check."""
        self.failed_checks = 0 if ok else self.failed_checks + 1
        if ok and not self.healthy:
            self.healthy = True
            self.begin_life()
        elif not ok and self.failed_checks >= unhealthy_after:
            self.healthy = self.read = self.asks_for_key = False

    def begin_life(self) -> None:
        """What happens from now on has other causes than what happened before."""
        self.life = next(_LIVES)


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
        self._declared: tuple[str, ...] = ()
        self._pools: dict[str, str] = {}  # name of a model or an adapter -> pool
        self.pools: tuple[str, ...] = ()  # models, each with replicas of its own
        self.prefixes = PrefixIndex(config.prefix_entries)

    def update(self, wanted: dict[str, str], models: Sequence[str] = ()) -> list[Replica]:
        """Set the replicas to {name: url}; omitted ones drain. Returns the new ones.

        models: names that are accepted even while they have no replica.
        """
        new = []
        for name, url in wanted.items():
            present = self.replicas.get(name)
            if present is None or present.url != url.rstrip("/"):
                if present is not None:
                    self._remove(present)
                self.replicas[name] = make_replica(name, url, self.config)
                new.append(self.replicas[name])
            else:
                present.draining = False
        for replica in [r for name, r in self.replicas.items() if name not in wanted]:
            self._remove(replica)
        self._declared = tuple(models)
        self._sort()
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

    # ---- models ----

    def reported(self, replica: Replica, entries: Sequence[Mapping[str, Any]]) -> None:
        """Set the entries of a replica's /v1/models: its model, then further names and adapters."""
        replica.entries, replica.read = tuple(entries), True
        self._sort()

    def _sort(self) -> None:
        """Sort the replicas into pools. A pool is called by a declared name, or by its replicas' first."""
        self._pools = {name: name for name in self._declared}
        for replica in self.replicas.values():
            names = [str(entry["id"]) for entry in replica.entries]
            replica.pool = next((name for name in self._declared if name in names), (names or [""])[0])
            if replica.pool:
                self._pools[replica.pool] = replica.pool
        for replica in self.replicas.values():  # a further name of one never takes another's model
            for entry in replica.entries:
                self._pools.setdefault(str(entry["id"]), replica.pool)
        self.pools = tuple(dict.fromkeys(self._pools.values()))

    def pool(self, model: str | None) -> str:
        """The pool of a model; empty if it is not known."""
        if model is None:
            return ""
        return self._pools.get(model) or self._pools.get(model.removesuffix(":latest"), "")

    @property
    def names(self) -> list[str]:
        """The names that requests may use."""
        return [name for name in self._pools if name]

    def unknown(self, model: str | None) -> bool:
        """Whether no replica serves a model.

        A fleet of one model leaves that to its replicas. One that has yet to say what it serves may serve it.
        """
        if model is None or len(self.pools) < 2 or self.pool(model):
            return False
        return all(replica.pool for replica in self.replicas.values())

    def candidates(self, tried: Sequence[Replica] = (), model: str | None = None) -> list[Replica]:
        """The available replicas of a model (None: of any) that are not yet tried."""
        pool = self.pool(model)
        replicas = self.replicas.values()
        known = pool and any(r.pool == pool for r in replicas)
        free = model is None or (len(self.pools) < 2 and not known)
        return [r for r in replicas if (free or r.pool == pool) and r not in tried and r.available]

    def choose(self, prompt: Prompt, tried: Sequence[Replica] = ()) -> Replica | None:
        """The replica for a request, or None if no untried one is available."""
        candidates = self.candidates(tried, prompt.model)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        depths = self.prefixes.depths(prompt.blocks)
        return min(
            candidates,
            key=lambda r: (r.queue + cost(self.config, r.load, prompt, depths.get(r.name, 0)), r.served),
        )

    def learn(self, prompt: Prompt, replica: Replica) -> int:
        """Record where a request is sent. Returns the bytes that the replica must compute for it."""
        depth = self.prefixes.depths(prompt.blocks).get(replica.name, 0)
        if len(self.replicas) > 1:
            self.prefixes.learn(prompt.blocks, replica.name)
        return uncached(self.config, prompt, depth)


def cost(config: GatewayConfig, requests: int, prompt: Prompt, depth: int) -> float:
    """Cost of a request on a replica that runs `requests` others and has the first `depth` blocks cached, in
    bytes of prompt text.

    A queue delays only this request. Uncached text delays it and all later ones, so it has a weight.
    """
    return requests * config.request_weight + config.uncached_weight * uncached(config, prompt, depth)


def uncached(config: GatewayConfig, prompt: Prompt, depth: int) -> int:
    """Bytes of the prompt after its first `depth` blocks."""
    return max(0, prompt.size - depth * config.prefix_block)


# Detects hung replicas, which accept requests but send nothing.

_WINDOW = 1024  # number of TTFTs kept
_ENOUGH = 100  # with fewer TTFTs, only health checks detect failures


class Silence:
    """The P99 time to first token of streams over all replicas of a model, plus a margin.

    A replica is hung if it has sent no byte of any answer for that long while a stream waits for its first
    one. Answers that are not streamed do not count: they are silent until complete.
    """

    def __init__(self, margin_s: float) -> None:
        self._margin_s = margin_s
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def observe(self, seconds: float) -> None:
        """Record one time to first token."""
        if len(self._recent) == _WINDOW:
            self._sorted.remove(self._recent.popleft())
        self._recent.append(seconds)
        insort(self._sorted, seconds)

    @property
    def limit_s(self) -> float | None:
        """Maximum seconds of silence; None while too few TTFTs are known."""
        if len(self._sorted) < _ENOUGH:
            return None
        return self._sorted[int(len(self._sorted) * 0.99)] + self._margin_s

    def hung(self, replica: Replica, now: float) -> bool:
        """Whether the replica has been silent for too long."""
        limit = self.limit_s
        if limit is None or now - replica.heard <= limit:
            return False
        return any(a.streamed and not a.heard and now - a.began > limit for a in replica.active)


# Health checks: polls each replica and detects replicas that stop answering.

_FIRST_CHECK_S = 0.1  # between checks of a replica that has never been healthy
_CLOSE = {"Connection": "close"}  # every check shows that the replica still accepts connections


class Health:
    """Monitors replicas."""

    def __init__(
        self,
        config: GatewayConfig,
        silence: Callable[[str], Silence],
        meet: Callable[[Replica], Awaitable[None]],
        on_change: Callable[[], None],
    ) -> None:
        """silence: of a pool; meet: called before a replica counts as healthy; on_change: called when one
        becomes healthy or unhealthy.
        """
        self._config, self._silence, self._meet, self._on_change = config, silence, meet, on_change
        self._http = Upstream(config.health_timeout_s, config.health_timeout_s)
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._http.close()

    def watch(self, replica: Replica) -> None:
        """Check a replica until it drains."""
        task = asyncio.create_task(self._watch(replica))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def check(self, replica: Replica) -> int | None:
        """The status code of one health check; None on timeout."""
        config = self._config
        try:
            timeout = config.health_timeout_s
            return (await self._http.get(replica.url, config.health_path, _CLOSE, timeout=timeout))[0]
        except ReplicaLost:
            return None

    async def alive(self, replica: Replica) -> bool:
        """Whether the replica's process answers at all."""
        return await self.check(replica) is not None

    async def _watch(self, replica: Replica) -> None:
        seen_healthy = False
        while not replica.draining:
            before = replica.healthy
            status = await self.check(replica)
            if status == 200 and not replica.read:
                await self._meet(replica)
            replica.checked(status == 200, self._config.unhealthy_after)
            seen_healthy |= replica.healthy
            if replica.healthy != before:
                log.info("replica %s is %s", replica.name, "healthy" if replica.healthy else "unhealthy")
                self._on_change()
            if status is None and not replica.healthy and before:
                self._give_up(replica, "no answer to health checks")
            elif replica.healthy and self._hung(replica):
                replica.breaker.trip()
                self._give_up(replica, f"silent for {self._silence(replica.pool).limit_s:.1f} s")
            await asyncio.sleep(self._config.health_interval_s if seen_healthy else _FIRST_CHECK_S)

    def _hung(self, replica: Replica) -> bool:
        return self._silence(replica.pool).hung(replica, asyncio.get_running_loop().time())

    def _give_up(self, replica: Replica, reason: str) -> None:
        """Move the requests that wait for a first byte to other replicas."""
        unanswered = [active for active in replica.active if not active.heard]
        log.warning("replica %s: %s; moving %d unanswered requests", replica.name, reason, len(unanswered))
        for active in unanswered:
            active.interrupt("hung")
        replica.begin_life()
