"""The softmax kernel against torch's, one thread each, interleaved: median processor time.

    python bench/softmax.py

`plain` is softmax as separate ops: maximum, difference, exponential, sum, quotient, each its own pass over
memory. `sdpa` is torch's fused attention with scores of this shape for a head of 64. It also computes two
products, so it is printed for context without a ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from farthing.ops.cpu import create

HEAD = 64
SHAPES = [(16, 512), (256, 1000), (16, 4096), (64, 4096), (256, 4096), (16, 32000), (4, 129280)]


def seconds(f: Callable[[], object], calls: int) -> float:
    """Processor time per call, which a busy machine affects less than wall time."""
    start = time.thread_time()
    for _ in range(calls):
        f()
    return (time.thread_time() - start) / calls


def plain(x: Tensor) -> Tensor:
    """Softmax as five ops."""
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def attention(rows: int, n: int) -> Callable[[], Tensor]:
    """torch's fused attention of `rows` queries over `n` keys, one head of 64."""
    q, k, v = torch.randn(1, 1, rows, HEAD), torch.randn(1, 1, n, HEAD), torch.randn(1, 1, n, HEAD)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    ops = create(None, 1, None, None)
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape) * 4
        systems: dict[str, Callable[[], Tensor]] = {
            "ours": lambda x=x: ops.softmax(x),
            "torch": lambda x=x: x.softmax(-1),
            "plain": lambda x=x: plain(x),
            "sdpa": attention(*shape),
        }
        calls = max(5, 4_000_000 // x.numel())
        readings: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(9):
            for name, f in systems.items():
                readings[name].append(seconds(f, calls))
        took = {name: statistics.median(r) for name, r in readings.items()}
        ratios = {f"{name}_over_ours": took[name] / took["ours"] for name in ("torch", "plain")}
        rows.append({"shape": shape, **{f"{name}_us": t * 1e6 for name, t in took.items()}, **ratios})
    if a.json:
        print(json.dumps(rows))
        return
    for r in rows:
        print(
            f"{r['shape']}: ours {r['ours_us']:.1f} us, "
            f"torch {r['torch_us']:.1f} ({r['torch_over_ours']:.2f}x), "
            f"plain {r['plain_us']:.1f} ({r['plain_over_ours']:.2f}x), "
            f"sdpa {r['sdpa_us']:.1f}"
        )


if __name__ == "__main__":
    main()
