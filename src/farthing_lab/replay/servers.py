"""Simulated replicas with a prefix cache, chunked prefill and continuous batching, for one pool or for two.

A `Whole` replica computes prompts and generates: an iteration adds a token to every running request and
computes at most one chunk of a prompt, in base + share · batch + chunk · prefill seconds. A `Prefill` replica
only computes prompts, one after the other; a `Decode` replica only generates, for requests whose cache
entries were transferred to it.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from farthing_lab.replay.trace import BLOCK


@dataclass(frozen=True)
class Times:
    """Times of one replica: a large model on one node."""

    prefill_s: float = 1 / 8000  # per prompt token that is not cached
    base_s: float = 0.02  # per iteration
    share_s: float = 0.0005  # per request in the batch and iteration
    max_batch: int = 32
    cache_blocks: int = 6000
    transfer_s: float = 1.4e-6  # per prompt token, from a prefill to a decode replica: 70 kB at 50 GB/s

    def step_s(self, batch: int) -> float:
        """An iteration without a prompt."""
        return self.base_s + self.share_s * batch

    def chunk(self, tpot_s: float) -> int:
        """Prompt tokens per iteration with which a full batch meets `tpot_s`; at least 32."""
        return max(32, int((tpot_s - self.step_s(self.max_batch)) / self.prefill_s))


@dataclass
class ReplayedRequest:
    """A request and what happened to it."""

    arrival: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    uncached: int = 0  # prompt tokens computed
    first: float = math.inf  # time of the first token
    end: float = math.inf

    @property
    def ttft_s(self) -> float:
        return self.first - self.arrival

    @property
    def tpot_s(self) -> float:
        """Mean time of the tokens after the first."""
        return (self.end - self.first) / (self.output - 1) if self.output > 1 else 0.0


@dataclass
class Server:
    """What all replicas have: their times, the queue, and whether they are ready or drain."""

    times: Times
    launched: float
    ready_at: float
    clock: float = 0.0
    waiting: deque[ReplayedRequest] = field(default_factory=deque)
    draining: bool = False

    @property
    def requests(self) -> int:
        """Requests in the replica."""
        return len(self.waiting)

    def cost(self, job: ReplayedRequest) -> float:
        """Routing cost: the replica with the lowest is chosen."""
        return float(self.requests)

    def add(self, job: ReplayedRequest) -> None:
        """Route a request here."""
        self.waiting.append(job)

    def advance(self, until: float, done: list[ReplayedRequest]) -> None:
        """Simulate until `until`, finishing an iteration in flight; appends finished requests."""
        raise NotImplementedError


@dataclass
class _Cached(Server):
    """A replica with a prefix cache, routed to by queue and cached prefix as the gateway does."""

    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    queued: int = 0  # prompt tokens to compute, as estimated on arrival

    def found(self, job: ReplayedRequest) -> int:
        """Prompt tokens in the cache."""
        blocks, cache = job.blocks, self.cache
        # a block is used with all before it, so the cached ones are the first
        depth = bisect.bisect_left(range(len(blocks)), True, key=lambda index: blocks[index] not in cache)
        return min(depth * BLOCK, job.prompt - 1)

    def cost(self, job: ReplayedRequest) -> float:
        return self.queued + self.requests * BLOCK + 3 * (job.prompt - self.found(job))

    def add(self, job: ReplayedRequest) -> None:
        job.uncached = job.prompt - self.found(job)
        self.queued += job.uncached
        super().add(job)

    def admit(self) -> ReplayedRequest:
        """Take the next request; its prompt's blocks are cached from now on."""
        job = self.waiting.popleft()
        self.queued -= job.uncached
        job.uncached = job.prompt - self.found(job)
        for block in reversed(job.blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.times.cache_blocks:
            self.cache.popitem(last=False)
        self.clock = max(self.clock, job.arrival)
        return job


@dataclass
class Prefill(_Cached):
    """Computes prompts, one after the other; the first token is the prompt's last computation."""

    current: ReplayedRequest | None = None

    @property
    def requests(self) -> int:
        return len(self.waiting) + (self.current is not None)

    def advance(self, until: float, done: list[ReplayedRequest]) -> None:
        while True:
            if self.current is not None and self.clock <= until:
                done.append(self.current)
                self.current = None
            if self.current is not None or not self.waiting or self.clock >= until:
                break
            self.current = job = self.admit()
            self.clock += self.times.base_s + job.uncached * self.times.prefill_s
            job.first = job.end = self.clock
        self.clock = max(self.clock, until)


@dataclass
class _Batch(Server):
    """A replica that generates: `running` holds (iteration of the last token, order, request)."""

    running: list[tuple[int, int, ReplayedRequest]] = field(default_factory=list)
    iterations: int = 0
    admitted: int = 0

    def start(self, job: ReplayedRequest) -> None:
        """Put a request into the batch."""
        self.admitted += 1
        heapq.heappush(self.running, (self.iterations + job.output - 1, self.admitted, job))

    def iterate(self, count: int, seconds: float, done: list[ReplayedRequest]) -> None:
        """`count` iterations of `seconds` each; ends the requests that have all their tokens."""
        self.clock += count * seconds
        self.iterations += count
        while self.running and self.running[0][0] <= self.iterations:
            job = heapq.heappop(self.running)[2]
            job.end = self.clock
            done.append(job)

    def steps(self, until: float, seconds: float) -> int:
        """Iterations until the next request ends or `until`, at least one."""
        count = max(1, math.ceil((until - self.clock) / seconds))
        return min(count, self.running[0][0] - self.iterations) if self.running else count


@dataclass
class Decode(_Batch):
    """Generates for requests whose prompt another replica computed."""

    @property
    def requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def advance(self, until: float, done: list[ReplayedRequest]) -> None:
        while self.clock < until:
            while self.waiting and len(self.running) < self.times.max_batch:
                job = self.waiting[0]
                if (arrives := job.first + job.prompt * self.times.transfer_s) > self.clock:
                    if self.running:
                        break
                    self.clock = arrives
                self.start(self.waiting.popleft())
            if self.running:
                seconds = self.times.step_s(len(self.running))
                count = self.steps(until, seconds)
                self.iterate(1 if self.waiting else count, seconds, done)
            else:
                self.clock = until


@dataclass
class Whole(_Batch, _Cached):
    """Computes prompts in chunks next to the batch, and generates."""

    chunk: int = 512  # prompt tokens per iteration while requests run
    current: ReplayedRequest | None = None  # its prompt is being computed
    left: int = 0  # prompt tokens of it

    @property
    def requests(self) -> int:
        return len(self.waiting) + len(self.running) + (self.current is not None)

    def advance(self, until: float, done: list[ReplayedRequest]) -> None:
        times = self.times
        while self.clock < until:
            if self.current is None and self.waiting and len(self.running) < times.max_batch:
                self.current = self.admit()
                self.left = self.current.uncached
            if self.current is not None:
                self._compute(self.current, until, done)
            elif self.running:
                seconds = times.step_s(len(self.running))
                self.iterate(self.steps(until, seconds), seconds, done)
            else:
                self.clock = until

    def _compute(self, job: ReplayedRequest, until: float, done: list[ReplayedRequest]) -> None:
        """Iterations with chunks of the prompt; without running requests, the rest of it at once."""
        part = min(self.left, self.chunk if self.running else self.left)
        seconds = self.times.step_s(len(self.running)) + part * self.times.prefill_s
        count = min(self.steps(until, seconds), self.left // part) if part else 1
        self.left -= count * part
        self.iterate(count, seconds, done)
        if self.left <= 0:
            job.first, self.current = self.clock, None
            if job.output > 1:
                self.start(job)
            else:
                job.end = self.clock
                done.append(job)
