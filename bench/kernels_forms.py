"""Forms of one product in turns: block-sparse matrices, the cells that they are made of, and AMX tiles.

`python bench/kernels.py --only sparse` compares matrices with zero blocks with dense ones; `--only cells`
gives the costs of a cell in `ops/weights.py`; `--only tiles` compares blocks of columns on AMX tiles with
what `--deterministic` computes, and with oneDNN's int8 product, and shows from how many rows on they pay.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from farthing import _native
from farthing.ops.api import Norm
from farthing.ops.cpu.weights import Experts, Linear, router_of
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import Weight, quantize_int8
from harness import in_turns, medians, timed

if TYPE_CHECKING:
    from kernels import Bench

Rows = list[list[object]]
Calls = Mapping[str, Sequence[Callable[[], Any]]]
SHAPES = ((2048, 2048), (7168, 2048))
EXPERTS, WIDTH = RouterSpec(64, 8, scale=2.5), 1024
PATTERNS: dict[str, tuple[int, int] | None] = {"dense": None, "16x16": (16, 16), "16x64": (16, 64)}
SPARSE = ("int4", "nl4", "int8")
FEW = (4, 6, 8, 12, 16, 24, 32, 48, 64)
TILED = RouterSpec(32, 4)


def compare(b: Bench, calls: Calls) -> dict[str, float]:
    """Median microseconds of a call of each kind, in turns of at least 20 ms. One thread is measured by its
    processor time, which other work on the machine affects less."""
    clock = time.thread_time if b.threads == 1 else time.perf_counter
    runs = {name: lambda some=some: timed(some, clock, 0.02) * 1e6 for name, some in calls.items()}
    return medians(in_turns(runs, b.passes))


def measure(b: Bench, a: argparse.Namespace) -> tuple[list[str], Rows]:
    """(headings, rows) of a form."""
    known = [name for name in a.formats if name in SPARSE]
    if a.only == "sparse":
        names = [f"{what}, {pattern}" for pattern in PATTERNS for what in ("us", "bytes")]
        found = [row for name in known for row in sparse(b, name, a.zeros)]
        return ["kernel", "rows", *names], found
    if a.only == "cells":
        return ["kernel", "rows", "dense, us", "1", "2", "3", "4"], [r for f in known for r in cells(b, f)]
    return ["kernel", "rows", "blocks, GOP/s", "exact", "oneDNN", "tiles' peak"], tiles(b, a)


def masked(name: str, keep: torch.Tensor) -> Weight:
    """A random matrix that is zero where `keep` is not set."""
    n, k = keep.shape
    if name == "nl4":
        return Weight("dense", torch.randn(n, k) * keep)
    if name == "int8":
        return Weight("int8", torch.randint(-127, 128, (n, k), dtype=torch.int8) * keep, torch.rand(n, 1))
    data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    zero = torch.full_like(data, 0x88)
    return Weight("int4", torch.where(keep[:, ::2], data, zero), torch.rand(n, k // 64) / k**0.5)


def weight(name: str, n: int, k: int, block: tuple[int, int] | None, zeros: float) -> Weight:
    """A random matrix with a share of its blocks zero."""
    r, c = block or (n, k)
    some = torch.zeros(n // r * (k // c), dtype=torch.bool)
    some[torch.randperm(len(some))[round(zeros * len(some)) if block else 0 :]] = True
    return masked(name, some.view(n // r, k // c).repeat_interleave(r, 0).repeat_interleave(c, 1))


def sparse(b: Bench, name: str, zeros: float) -> Rows:
    """Projections and a layer of experts, at 1, 16 and 512 rows."""
    found: Rows = []
    for n, k in SHAPES:
        packed = {
            pattern: b.packed(name, [weight(name, n, k, block, zeros)], blocks=block is not None)
            for pattern, block in PATTERNS.items()
        }
        views = {pattern: b.linears(p, n, k) for pattern, p in packed.items()}
        sizes = {pattern: p.nbytes for pattern, p in packed.items()}
        for rows in (1, 16, 512):
            x = torch.randn(rows, k)
            calls = {
                pattern: [lambda v=v, x=x: b.ops.linear(x, v) for v in (some if rows < 64 else some[:4])]
                for pattern, some in views.items()
            }
            found.append([f"linear {name} {n} x {k}", rows, *pairs(compare(b, calls), sizes)])
        b.alive = []
    return found + sparse_experts(b, name, zeros)


def pairs(took: Mapping[str, float], sizes: Mapping[str, int]) -> list[object]:
    """Microseconds and bytes of each pattern."""
    return [value for pattern in PATTERNS for value in (took[pattern], sizes[pattern])]


def sparse_experts(b: Bench, name: str, zeros: float) -> Rows:
    """A layer of experts with random routing."""
    gate, norm = b.gate(EXPERTS.num_experts, WIDTH), Norm(torch.ones(WIDTH), 1e-6)
    layers, sizes, found = {}, {}, []
    for pattern, block in PATTERNS.items():
        up, up_too, down = (weight(name, WIDTH, WIDTH, block, zeros) for _ in range(3))
        pair = (
            b.packed(name, [up, up_too], interleave=True, blocks=block is not None),
            b.packed(name, [down], blocks=block is not None),
        )
        sizes[pattern] = sum(p.nbytes for p in pair)
        layers[pattern] = b.layers(EXPERTS, gate, *pair)
    for rows in (1, 16, 512):
        xs = [torch.randn(rows, WIDTH) for _ in range(16 if rows < 64 else 1)]
        calls = {
            pattern: [lambda x=x, m=m: b.ops.moe(x, m, norm) for m in some for x in xs]
            for pattern, some in layers.items()
        }
        found.append([f"experts {name} {WIDTH} top {EXPERTS.top_k}", rows, *pairs(compare(b, calls), sizes)])
    b.alive = []
    return found


def cells(b: Bench, name: str) -> Rows:
    """Time of cells of 1 to 4 blocks relative to the same columns of a dense panel: matrices whose cells of
    16 x 64 all have the same number of their four blocks."""
    n, k = SHAPES[0]
    views, found = {}, []
    for blocks in range(5):  # 0: dense
        order = torch.rand(n // 16, k // 64, 4).argsort(-1)
        keep = (order < (blocks or 4)).flatten(1).repeat_interleave(16, 0).repeat_interleave(16, 1)
        views[str(blocks)] = b.linears(b.packed(name, [masked(name, keep)], blocks=blocks > 0), n, k)
    for rows in b.sizes:
        x = torch.randn(rows, k)
        b.ops.linear(x, views["0"][0])
        slow = timed([lambda x=x: b.ops.linear(x, views["0"][0])], time.perf_counter) > 1e-3
        calls = {
            blocks: [lambda v=v, x=x: b.ops.linear(x, v) for v in some[: 1 if slow else None]]
            for blocks, some in views.items()
        }  # one copy suffices where arithmetic is slower than memory
        took = compare(b, calls)
        found.append([f"{name} {n} x {k}", rows, took["0"], *(took[str(i)] / took["0"] for i in range(1, 5))])
    b.alive = []
    return found


def tiles(b: Bench, a: argparse.Namespace) -> Rows:
    """Products of many rows, then of few rows and of experts that have as many on average. --small: sizes for
    emulated tiles."""
    if "amx" not in _native.instruction_sets().split() or b.native.isa != "amx":
        raise SystemExit(f"--only tiles: got instruction set {b.native.isa}; expected a processor with AMX")
    n, ks, many, few = (64, [128], 64, 128) if a.small else (4096, [1024, 7168], 512, 2048)
    least, found = b.native.tile_tokens, []
    try:
        for name in (f for f in a.formats if f in ("int4", "int8", "bf16")):
            found += [projection(b, name, n, k, many) for k in ks]
            found += [projection(b, name, n, few, rows) for rows in FEW]
            found += tiled_experts(b, name, n, few)
    finally:
        b.native.tile_tokens = least
    return found


def both(
    b: Bench, call: Callable[[], Any], work: float, peer: Callable[[], Any] | None = None
) -> list[object]:
    """GOP/s in blocks of columns whatever the rows, in the exact form, and of a peer, after ours: torch's
    threads spin for a while."""

    def of(least: int) -> Callable[[], Any]:
        def run() -> None:
            b.native.tile_tokens = least
            call()

        return run

    took = compare(b, {"blocks": [of(1)], "exact": [of(0)]})
    if peer is not None:
        torch.set_num_threads(b.threads)
        took |= compare(b, {"peer": [peer]})
        torch.set_num_threads(1)
    return [work / us / 1e3 for us in took.values()] + ["–"] * (3 - len(took))


def of_format(name: str, n: int, k: int) -> Weight:
    """A random matrix; `int4` is rounded while it is packed."""
    w = torch.randn(n, k) / k**0.5
    return quantize_int8(w) if name == "int8" else Weight("dense", w.bfloat16())


def projection(b: Bench, name: str, n: int, k: int, rows: int) -> list[object]:
    """One projection; a tile has half as many bfloat16."""
    x, w = torch.randn(rows, k), of_format(name, n, k)
    handle = Linear(b.packed("nl4" if name == "int4" else name, [w]), n, k)
    peer = onednn(w.dequantize(), x) if name == "int8" else None
    rates = both(b, lambda: b.ops.linear(x, handle), 2.0 * n * k * rows, peer)
    peak = _native.peak_ops("amx_int8", b.threads) / (2 if name == "bf16" else 1)
    return [f"{name} {n} x {k}", rows, *rates, peak]


def onednn(w: torch.Tensor, x: torch.Tensor) -> Callable[[], Any] | None:
    """torch's int8 product with weights that oneDNN packed, rounding its input as it comes."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        return None
    torch.backends.quantized.engine = "onednn"
    scale = float(w.abs().max()) / 127
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(w, scale, 0, torch.qint8), None)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed)


def tiled_experts(b: Bench, name: str, n: int, k: int) -> Rows:
    """Experts that have a few rows each on average."""
    stored, norm, inner = "nl4" if name == "int4" else name, Norm(torch.ones(k), 1e-6), n // 4
    native = _native.Moe(router_of(TILED), b.gate(TILED.num_experts, k), False)
    for _ in range(TILED.num_experts):
        up = [of_format(name, inner, k) for _ in range(2)]
        down = of_format(name, k, inner)
        native.add(b.packed(stored, up, interleave=True), b.packed(stored, [down]))
    experts, found = Experts(native, TILED), []
    for rows in FEW:
        x = torch.randn(rows * TILED.num_experts // TILED.top_k, k)
        work = 2.0 * 3 * inner * k * rows * TILED.num_experts
        found.append(
            [f"{name} experts, rows each", rows, *both(b, lambda x=x: b.ops.moe(x, experts, norm), work), "–"]
        )
    return found
