"""A simulated replica with a prefix cache, chunked prefill and continuous batching.

An iteration adds a token to every running request and computes at most one chunk of a prompt, in
base + share · batch + chunk · prefill seconds.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace

from farthing_lab.replay.trace import BLOCK, RequestTrace


@dataclass(frozen=True)
class Times:
    """Times of one replica: a large model on one node."""

    prefill_s: float = 1 / 8000  # per prompt token that is not cached
    base_s: float = 0.02  # per iteration
    share_s: float = 0.0005  # per request in the batch and iteration
    max_batch: int = 32
    cache_blocks: int = 6000

    def step_s(self, batch: int) -> float:
        """An iteration without a prompt."""
        return self.base_s + self.share_s * batch

    def chunk(self, tpot_s: float) -> int:
        """Prompt tokens per iteration with which a full batch meets `tpot_s`; at least 32."""
        return max(32, int((tpot_s - self.step_s(self.max_batch)) / self.prefill_s))

    def capacity(self, prompt: float, output: float) -> float:
        """Requests per second with a full batch, for a mean request."""
        return 1 / (self.prefill_s * prompt + output * self.step_s(self.max_batch) / self.max_batch)

    def fitted(self, trace: RequestTrace, capacity: float) -> Times:
        """A replica with this capacity: the smallest sufficient batch, with all times scaled to match."""
        prompt, output = float(trace.prompt_tokens.mean()), float(trace.output_tokens.mean())
        found = self
        for batch in range(1, self.max_batch + 1):
            found = replace(self, max_batch=batch)
            if found.capacity(prompt, output) >= capacity:
                break
        factor = found.capacity(prompt, output) / capacity
        return replace(
            found,
            prefill_s=found.prefill_s * factor,
            base_s=found.base_s * factor,
            share_s=found.share_s * factor,
        )


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
class Replica:
    """`running` holds (iteration of the last token, order, request)."""

    times: Times
    launched: float
    ready_at: float
    clock: float = 0.0
    waiting: deque[ReplayedRequest] = field(default_factory=deque)
    draining: bool = False
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    queued: int = 0  # prompt tokens to compute, as estimated on arrival
    running: list[tuple[int, int, ReplayedRequest]] = field(default_factory=list)
    iterations: int = 0
    admitted: int = 0
    chunk: int = 512  # prompt tokens per iteration while requests run
    current: ReplayedRequest | None = None  # its prompt is being computed
    left: int = 0  # prompt tokens of it

    @property
    def requests(self) -> int:
        """Requests in the replica."""
        return len(self.waiting) + len(self.running) + (self.current is not None)

    @property
    def generated(self) -> int:
        """Tokens of the running requests."""
        return sum(job.output - (last - self.iterations) for last, _, job in self.running)

    def found(self, job: ReplayedRequest) -> int:
        """Prompt tokens in the cache."""
        blocks, cache = job.blocks, self.cache
        # a block is used with all before it, so the cached ones are the first
        depth = bisect.bisect_left(range(len(blocks)), True, key=lambda index: blocks[index] not in cache)
        return min(depth * BLOCK, job.prompt - 1)

    def cost(self, job: ReplayedRequest) -> float:
        """Routing cost, as the gateway's: the replica with the lowest is chosen."""
        return self.queued + self.left + self.requests * BLOCK + 3 * (job.prompt - self.found(job))

    def add(self, job: ReplayedRequest) -> None:
        """Route a request here."""
        job.uncached = job.prompt - self.found(job)
        self.queued += job.uncached
        self.waiting.append(job)

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
        return job

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

    def advance(self, until: float, done: list[ReplayedRequest]) -> None:
        """Simulate until `until`, finishing an iteration in flight; appends finished requests."""
        times = self.times
        while self.clock < until:
            due = min(until, self.waiting[0].arrival) if self.waiting else until
            full = len(self.running) >= times.max_batch
            if self.current is None and self.waiting and due <= self.clock and not full:
                self.current = self.admit()
                self.left = self.current.uncached
            if self.current is not None:
                self._compute(self.current, until, done)
            elif self.running:
                seconds = times.step_s(len(self.running))
                self.iterate(self.steps(until if full else due, seconds), seconds, done)
            else:
                self.clock = due

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
