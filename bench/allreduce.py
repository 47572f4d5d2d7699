"""All-reduce and all-to-all between two ranks of this host: shared memory and gloo, with a copy as the limit.

"in a step" is the same sum called from native code, as the CPU kernels do between two layers.

    python bench/allreduce.py [--elements 7168] [--rounds 5]

Rounds of both transports are interleaved; figures are medians over all calls of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import astuple
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table

from farthing import _native
from farthing.parallel.collectives import DistGroup, Group
from farthing.parallel.shared import Arena, SharedGroup, arena_bytes
from farthing_lab.demo.levers import free_port

CALLS, WARMUP = 400, 50


def timed(call: Callable[[], object]) -> list[float]:
    """Microseconds of each call."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return times


def work(rank: int, path: Path, port: int, elements: int, rounds: int, out: Connection) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    memory = SharedGroup(Arena(path), 0, 2, rank)
    groups: dict[str, Group] = {"gloo": DistGroup([0, 1], 60.0), "shared": memory}
    native = _native.SharedSum(*astuple(memory.shared_sum()))
    x, target = torch.ones(elements), torch.empty(elements)
    half = [torch.ones(4, elements // 8), torch.ones(4, elements // 8)]  # the same bytes in total
    times: dict[str, list[float]] = {"copy": []}
    for _ in range(rounds):
        times["copy"] += timed(lambda: target.copy_(x))
        for name, group in groups.items():
            check = group.all_reduce(torch.full((elements,), rank + 1.0))
            assert bool((check == 3).all())
            times.setdefault(f"{name} all-reduce", []).extend(timed(lambda g=group: g.all_reduce(x.fill_(1))))
            times.setdefault(f"{name} all-to-all", []).extend(timed(lambda g=group: g.all_to_all(half)))
        times.setdefault("shared all-reduce, in a step", []).extend(
            timed(lambda: native.add(x.fill_(1).data_ptr(), elements, 1, elements))
        )
        assert bool((x == 2).all())
    if rank == 0:
        out.send({name: statistics.median(values) for name, values in times.items()})
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Collectives between two ranks of this host.")
    parser.add_argument("--elements", type=int, default=7168, help="float32 numbers (V3's hidden size)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    arena, port = Arena.create(arena_bytes([2])), free_port()
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=work, args=(r, arena.path, port, a.elements, a.rounds, theirs))
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        result: dict[str, float] = ours.recv()
    finally:
        for process in ranks:
            process.join()
        arena.unlink()
    size = 4 * a.elements
    # Shared memory: x into the slot. gloo copies into and out of socket buffers, each way.
    shared = ("shared all-reduce", "shared all-reduce, in a step")
    copied = {**dict.fromkeys(shared, size), "gloo all-reduce": 2 * size}
    ratio, inside = (result["gloo all-reduce"] / result[name] for name in shared)
    if a.json:
        ratios = {"ratio": ratio, "in_a_step": inside}
        print(json.dumps({"us": result, **ratios, "bytes_copied": copied, "cores": os.cpu_count()}))
        return
    table = Table(
        "two ranks, float32", "us", "bytes copied per rank", title=f"{a.elements:,} numbers, {size:,} bytes"
    )
    for name, us in result.items():
        table.add_row(name, f"{us:.1f}", f"{copied[name]:,}" if name in copied else "")
    Console().print(table)
    Console().print(f"all-reduce: {ratio:.1f}x faster than gloo, {inside:.1f}x in a step (bar: 5x)")


if __name__ == "__main__":
    main()
