"""The softmax kernel against torch's, one thread each, in turn: processor time, medians.

python bench/softmax.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from farthing.ops.cpu import create

SHAPES = [(16, 512), (64, 4096), (16, 32000), (256, 1000)]


def seconds(f: Callable[[], object], calls: int) -> float:
    """Processor time of one call: a busy machine does not change it as much as the clock."""
    start = time.thread_time()
    for _ in range(calls):
        f()
    return (time.thread_time() - start) / calls


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    ops = create(None, 1, None, None)
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape) * 4
        systems = {"ours": lambda x=x: ops.softmax(x), "torch": lambda x=x: x.softmax(-1)}
        calls = max(5, 4_000_000 // x.numel())
        readings: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(9):
            for name, f in systems.items():
                readings[name].append(seconds(f, calls))
        ours, theirs = (statistics.median(readings[n]) for n in ("ours", "torch"))
        rows.append({"shape": shape, "ours_us": ours * 1e6, "torch_us": theirs * 1e6, "ratio": theirs / ours})
    if a.json:
        print(json.dumps(rows))
        return
    for r in rows:
        print(f"{r['shape']}: ours {r['ours_us']:.1f} us, torch {r['torch_us']:.1f} us, {r['ratio']:.2f}x")


if __name__ == "__main__":
    main()
