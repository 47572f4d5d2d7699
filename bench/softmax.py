"""The softmax kernel against torch's, one thread each: processor time, and bytes against a copy's.

    python bench/softmax.py

Outputs are allocated once, and every system takes a call that is not measured before each of its turns:
fresh memory costs all of them 1 to 2 us per 4 KB, more than softmax itself. `torch` is the fused
torch.softmax, `in place` its five unfused ops (maximum, difference, exponential, sum, quotient) without
temporaries, `five ops` the same with a fresh tensor for each result, as usually written. `copy` writes the
input to the output, so it moves the bytes that softmax must move at least. Medians of interleaved turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farthing.ops.cpu import create
from farthing.ops.cpu.stack import native_rows

SHAPES = [(16, 512), (256, 1000), (16, 4096), (64, 4096), (256, 4096), (2048, 4096), (16, 32000),
          (512, 32000), (4, 129280), (1, 129280)]  # fmt: skip
SYSTEMS = ("ours", "torch", "in place", "five ops", "copy")


def seconds(f: Callable[[], object], calls: int) -> float:
    """Processor time per call, which a busy machine affects less than wall time."""
    f()
    start = time.thread_time()
    for _ in range(calls):
        f()
    return (time.thread_time() - start) / calls


def five_ops(x: Tensor) -> Tensor:
    """Softmax as five ops."""
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def in_place(x: Tensor, out: Tensor) -> Tensor:
    """The same without temporaries as large as x."""
    torch.sub(x, x.amax(-1, keepdim=True), out=out).exp_()
    return out.div_(out.sum(-1, keepdim=True))


def measure(native: Any, shape: tuple[int, int], passes: int) -> dict[str, float]:
    """Microseconds of each system."""
    x = torch.randn(shape) * 4
    out = torch.zeros_like(x)
    systems: dict[str, Callable[[], object]] = {
        "ours": lambda: native.softmax(native_rows(x), *shape, native_rows(out)),
        "torch": lambda: torch.softmax(x, -1, out=out),
        "in place": lambda: in_place(x, out),
        "five ops": lambda: five_ops(x),
        "copy": lambda: out.copy_(x),
    }
    calls = max(1, 2_000_000 // x.numel())
    readings: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(passes):
        for name, f in systems.items():
            readings[name].append(seconds(f, calls))
    return {name: statistics.median(r) * 1e6 for name, r in readings.items()}


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--passes", type=int, default=9)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(1)
    native = create(None, 1, None, None)._native
    rows = {shape: measure(native, shape, a.passes) for shape in SHAPES}
    if a.json:
        print(json.dumps([{"shape": shape, "us": took} for shape, took in rows.items()]))
        return
    print("| shape | ours, us | " + " | ".join(SYSTEMS[1:]) + " |")
    print("|---" * (len(SYSTEMS) + 1) + "|")
    for (n, k), took in rows.items():
        ratios = " | ".join(f"{took[name] / took['ours']:.2f}x" for name in SYSTEMS[1:])
        print(f"| {n} x {k} | {took['ours']:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
