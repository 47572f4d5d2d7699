"""Prefix routing at request level: a Mooncake trace, the gateway's own balancer, simulated replicas.

A replica admits a request when its batch has room and computes the uncached part of the prompt (the batch
pauses meanwhile). Every iteration then adds one token to each running request. Parameters: 8,000 prompt
tokens/s, 20 ms + 0.5 ms × batch per iteration, 32 requests, an LRU cache of blocks of 512 tokens. The gateway
reads each replica's digest every 2 s. `one cache` is the bound: one unlimited cache shared by all replicas.

Other rows: `guess` knows only what was sent (replicas without a digest), `truth` every cache at every
moment (as events of its blocks would tell). `moved GBIT` is the gateway, and a replica copies a
prefix that another one has over a link of its own instead of computing it, at `--bytes` per token.

    python bench/prefix_routing.py mooncake_conversation.jsonl.gz [--load 1.5] [--replicas 8] [--cache 6000]
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farthing.prompts import Prompt
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.replicas import Balancer, PrefixIndex, Replica

BLOCK = 512  # tokens per block of the trace
PREFILL_S, BASE_S, SHARE_S, BATCH = 1 / 8000, 0.02, 0.0005, 32
DIGEST_S = 2.0
GUESSED = 16_384  # blocks that the gateway assumes of a replica without a digest: 65,536 of 512 bytes of text
TARGET_S = 5.0  # time to first token


@dataclass
class Job:
    """One request in a replica."""

    arrival: float
    blocks: tuple[int, ...]
    prompt: int
    output: int
    counted: int  # tokens it adds to the gateway's estimate of the queue


@dataclass
class Server:
    """A simulated replica; `seen` is the gateway's view of it."""

    seen: Replica
    capacity: int  # blocks
    others: list[Server] = field(default_factory=list)
    move_s: float = PREFILL_S  # per token of a prefix that another replica has
    clock: float = 0.0
    iterations: int = 0
    waiting: deque[Job] = field(default_factory=deque)
    ends: list[int] = field(default_factory=list)  # iteration counts at which requests end
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def advance(self, until: float, done: list[tuple[float, int, int]]) -> None:
        """Simulate until `until`; appends (TTFT, cached, prompt tokens) per admitted request."""
        while self.clock < until:
            if self.waiting and len(self.ends) < BATCH:
                self._admit(self.waiting.popleft(), done)
            elif self.ends:
                step = BASE_S + SHARE_S * len(self.ends)
                count = min(self.ends[0] - self.iterations, max(1, math.ceil((until - self.clock) / step)))
                self.clock += count * step
                self.iterations += count
                while self.ends and self.ends[0] <= self.iterations:
                    heapq.heappop(self.ends)
                    self.seen.inflight -= 1
            else:
                self.clock = until

    def _admit(self, job: Job, done: list[tuple[float, int, int]]) -> None:
        depth = next((i for i, b in enumerate(job.blocks) if b not in self.cache), len(job.blocks))
        cached = min(depth * BLOCK, job.prompt - 1)
        moved = self._moved(job, cached) if self.move_s < PREFILL_S else 0
        for block in reversed(job.blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.capacity:
            self.cache.popitem(last=False)
        computed = job.prompt - cached - moved
        self.clock = max(self.clock, job.arrival) + computed * PREFILL_S + moved * self.move_s
        done.append((self.clock - job.arrival, cached + moved, job.prompt))
        self.seen.queued -= job.counted
        if job.output > 1:
            heapq.heappush(self.ends, self.iterations + job.output - 1)
        else:
            self.seen.inflight -= 1

    def _moved(self, job: Job, cached: int) -> int:
        """Tokens after the cached ones that some other replica has."""
        depths = (
            next((i for i, b in enumerate(job.blocks) if b not in other.cache), len(job.blocks))
            for other in self.others
        )
        return max(0, min(max(depths, default=0) * BLOCK, job.prompt - 1) - cached)


class Truth(PrefixIndex):
    """An index that knows each replica's cache, and the prompts that wait there."""

    servers: dict[str, Server]

    def depths(self, blocks: Sequence[int]) -> dict[str, int]:
        found = {}
        for name, server in self.servers.items():
            waiting = {block for job in server.waiting for block in job.blocks}
            known = (i for i, b in enumerate(blocks) if b not in server.cache and b not in waiting)
            found[name] = next(known, len(blocks))
        return found


Choose = Callable[[Balancer, Prompt], Replica]


def routed(balancer: Balancer, prompt: Prompt) -> Replica:
    """Routing as in the gateway."""
    chosen = balancer.choose(prompt)
    assert chosen is not None
    return chosen


def least(balancer: Balancer, prompt: Prompt) -> Replica:
    """The replica with the fewest requests in flight, ignoring caches."""
    return min(balancer.replicas.values(), key=lambda r: (r.inflight, r.served))


def affine(balancer: Balancer, prompt: Prompt) -> Replica:
    """The previous rule: the longest cached prefix, unless that replica has more than four requests above the
    least loaded.
    """
    fewest = least(balancer, prompt)
    depths = balancer.prefixes.depths(prompt.blocks)
    best = max(balancer.replicas.values(), key=lambda r: (depths.get(r.name, 0), -r.inflight))
    return best if depths.get(best.name) and best.inflight <= fewest.inflight + 4 else fewest


def simulate(
    trace: list[dict[str, Any]],
    choose: Choose,
    options: argparse.Namespace,
    view: str = "digest",
    link: float | None = None,
) -> dict[str, float]:
    """Simulate one run. view: digest, guess or truth; link: Gbit/s between replicas."""
    now = 0.0
    balancer = Balancer(GatewayConfig(prefix_block=BLOCK, request_weight=512))
    entries = GUESSED if view == "guess" else options.cache
    balancer.prefixes = (Truth if view == "truth" else PrefixIndex)(entries, clock=lambda: now)
    balancer.update({f"r{i}": f"http://127.0.0.1:{i + 1}" for i in range(options.replicas)})
    servers = {r.name: Server(r, options.cache) for r in balancer.replicas.values()}
    for replica in balancer.replicas.values():
        replica.healthy = True
    if isinstance(balancer.prefixes, Truth):
        balancer.prefixes.servers = servers
    for server in servers.values():
        server.others = [other for other in servers.values() if other is not server]
        server.move_s = options.bytes * 8 / (link * 1e9) if link else PREFILL_S
    done: list[tuple[float, int, int]] = []
    due = 0.0
    for row in trace:
        now = row["timestamp"] / 1000 / options.load
        for server in servers.values():
            server.advance(now, done)
        if now >= due and view == "digest":
            due = now + DIGEST_S
            for name, server in servers.items():
                balancer.prefixes.replace(name, server.cache)
        prompt = Prompt(tuple(row["hash_ids"]), row["input_length"], streamed=True)
        replica = choose(balancer, prompt)
        counted = balancer.learn(prompt, replica)
        replica.queued += counted
        replica.inflight += 1
        replica.served += 1
        job = Job(now, prompt.blocks, row["input_length"], row["output_length"], counted)
        servers[replica.name].waiting.append(job)
    for server in servers.values():
        while server.waiting or server.ends:
            server.advance(server.clock + 60.0, done)
    return summary(done)


def summary(done: list[tuple[float, int, int]]) -> dict[str, float]:
    """The figures of a run."""
    times = sorted(first for first, _, _ in done)
    return {
        "cached": sum(cached for _, cached, _ in done) / sum(prompt for _, _, prompt in done),
        "within": sum(time <= TARGET_S for time in times) / len(times),
        "p50_s": times[len(times) // 2],
        "p95_s": times[int(len(times) * 0.95)],
    }


def bound(trace: list[dict[str, Any]]) -> dict[str, float]:
    """One unlimited cache and no queue."""
    seen: set[int] = set()
    done = []
    for row in trace:
        blocks = row["hash_ids"]
        depth = next((i for i, b in enumerate(blocks) if b not in seen), len(blocks))
        cached = min(depth * BLOCK, row["input_length"] - 1)
        done.append(((row["input_length"] - cached) * PREFILL_S, cached, row["input_length"]))
        seen.update(blocks)
    return summary(done)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--load", type=float, default=1.5, help="factor on the arrival rate")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--cache", type=int, default=6000, help="blocks of 512 tokens per replica")
    parser.add_argument("--bytes", type=int, default=70_272, help="cache per token (DeepSeek-V3's latents)")
    parser.add_argument("--rows", nargs="*", help="only these")
    parser.add_argument("--requests", type=int, help="use only the first N requests")
    options = parser.parse_args()
    with gzip.open(options.trace, "rt") as file:
        trace = [json.loads(line) for line in file][: options.requests]
    size = f"{options.replicas} replicas with {options.cache} blocks"
    print(f"{len(trace)} requests, load x{options.load:g}, {size}")
    print(f"{'':16}{'cached':>8}{'of bound':>10}{f'TTFT <= {TARGET_S:g} s':>14}{'p50':>8}{'p95':>8}")
    best = bound(trace)
    rows: tuple[tuple[str, Choose | None, str, float | None], ...] = (
        ("one cache", None, "", None),
        ("least loaded", least, "digest", None),
        ("affinity", affine, "digest", None),
        ("gateway", routed, "digest", None),
        ("guess", routed, "guess", None),
        ("truth", routed, "truth", None),
        ("moved 1", routed, "digest", 1.0),
        ("moved 10", routed, "digest", 10.0),
        ("moved 100", routed, "digest", 100.0),
    )
    for name, choose, view, link in rows:
        if options.rows and name not in options.rows:
            continue
        row = best if choose is None else simulate(trace, choose, options, view, link)
        print(
            f"{name:16}{row['cached']:8.1%}{row['cached'] / best['cached']:10.1%}{row['within']:14.1%}"
            f"{row['p50_s']:8.2f}{row['p95_s']:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
