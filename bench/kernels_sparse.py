"""Block-sparse matrices compared with dense ones, for `bench/kernels.py --only sparse`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from farthing import _native
from farthing.ops.api import Norm
from farthing.ops.cpu import formats as packing
from farthing.ops.cpu.weights import Experts, Linear, router_of
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import Weight

SHAPES = ((2048, 2048), (7168, 2048))
EXPERTS, TOP, HIDDEN, WIDTH = 64, 8, 1024, 1024
PATTERNS: dict[str, tuple[int, int] | None] = {"dense": None, "16x16": (16, 16), "16x64": (16, 64)}
ROWS = (1, 16, 512)
FORMATS = ("int4", "nl4", "int8")  # nl4: what `--quantization int4` rounds to
CELLS_OF = (2048, 2048)


@dataclass(frozen=True, slots=True)
class SparseRow:
    """One matrix or layer of experts at one number of rows, dense and in each pattern."""

    kernel: str
    rows: int
    microseconds: dict[str, float]
    bytes: dict[str, int]

    def speedup(self, pattern: str) -> float:
        """Time of the dense kernel divided by the pattern's."""
        return self.microseconds["dense"] / self.microseconds[pattern]

    def size(self, pattern: str) -> float:
        """Bytes of the pattern divided by the dense form's."""
        return self.bytes[pattern] / self.bytes["dense"]


def weight(name: str, n: int, k: int, block: tuple[int, int] | None, zeros: float) -> Weight:
    """A random matrix with a share of its blocks zero."""
    keep = torch.ones(n, k, dtype=torch.bool)
    if block is not None:
        r, c = block
        some = torch.zeros(n // r * (k // c), dtype=torch.bool)
        some[torch.randperm(len(some))[round(zeros * len(some)) :]] = True
        keep = some.view(n // r, k // c).repeat_interleave(r, 0).repeat_interleave(c, 1)
    return masked(name, keep)


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


def target(name: str, weights: list[Weight]) -> packing.Plan:
    """The packed format."""
    return packing.plan(weights, "int4" if name == "nl4" else None)


def cells(n: int, k: int, blocks: int) -> torch.Tensor:
    """What is kept of a matrix [n, k] if every cell of 16 x 64 has this number of its four blocks."""
    order = torch.rand(n // 16, k // 64, 4).argsort(-1)
    return (order < blocks).flatten(1).repeat_interleave(16, 0).repeat_interleave(16, 1)


def interleaved(b: Any, calls: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Median microseconds of a call of each kind, measured in turns of at least 20 ms.

    One thread is measured by its processor time, which other work on the machine affects less.
    """
    clock = time.thread_time if b.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds = {}
    for name, some in calls.items():
        start = clock()
        for call in some:
            call()
        rounds[name] = max(1, int(0.02 / (clock() - start)))
    for _ in range(b.passes):
        for name, some in calls.items():
            start = clock()
            for _ in range(rounds[name]):
                for call in some:
                    call()
            seconds[name].append((clock() - start) / (rounds[name] * len(some)))
    return {name: statistics.median(s) * 1e6 for name, s in seconds.items()}


def linear(b: Any, name: str, n: int, k: int, zeros: float, uncached: int) -> list[SparseRow]:
    """A projection [n, k]."""
    packed, views = {}, {}
    for pattern, block in PATTERNS.items():
        w = weight(name, n, k, block, zeros)
        p = packed[pattern] = packing.pack(b.native, [w], target(name, [w]), blocks=block is not None)
        views[pattern] = [Linear(v, n, k) for v in b.copies(p, max(2, uncached // p.nbytes))]
    rows = []
    for tokens in ROWS:
        x = torch.randn(tokens, k)
        calls = {
            pattern: [lambda v=v, x=x: b.ops.linear(x, v) for v in (some if tokens < 64 else some[:4])]
            for pattern, some in views.items()
        }
        took = interleaved(b, calls)
        rows.append(
            SparseRow(f"linear {name} {n} x {k}", tokens, took, {p: packed[p].nbytes for p in packed})
        )
    b.alive = []
    return rows


def experts(b: Any, name: str, zeros: float, uncached: int) -> list[SparseRow]:
    """A layer of experts with random routing."""
    spec = RouterSpec(EXPERTS, TOP, scale=2.5)
    gate = Weight("dense", torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5)
    gate = packing.pack(b.native, [gate], packing.plan([gate], None))
    layers: dict[str, list[Experts]] = {}
    sizes = {}
    for pattern, block in PATTERNS.items():
        up = [weight(name, WIDTH, HIDDEN, block, zeros) for _ in range(2)]
        down = weight(name, HIDDEN, WIDTH, block, zeros)
        plan, sparse = target(name, up), block is not None
        pair = (
            packing.pack(b.native, up, plan, interleave=True, blocks=sparse),
            packing.pack(b.native, [down], plan, blocks=sparse),
        )
        sizes[pattern] = sum(p.nbytes for p in pair)
        layers[pattern] = []
        for _ in range(max(1, uncached // (sizes[pattern] * EXPERTS))):
            native = _native.Moe(router_of(spec), gate, True)
            for views in zip(*(b.copies(p, EXPERTS + 1) for p in pair), strict=True):
                native.add(*views)
            layers[pattern].append(Experts(native, spec))
    norm, rows = torch.ones(HIDDEN), []
    for tokens in ROWS:
        xs = [torch.randn(tokens, HIDDEN) for _ in range(16 if tokens < 64 else 1)]
        calls = {
            pattern: [lambda x=x, m=m: b.ops.moe(x, m, Norm(norm, 1e-6)) for m in some for x in xs]
            for pattern, some in layers.items()
        }
        took = interleaved(b, calls)
        rows.append(SparseRow(f"experts {name} {EXPERTS} x {WIDTH} top {TOP}", tokens, took, sizes))
    b.alive = []
    return rows


@dataclass(frozen=True, slots=True)
class CellRow:
    """Time of cells of 1 to 4 blocks relative to the same columns of a dense panel, for `ops/weights.py`."""

    kernel: str
    rows: int
    dense_us: float
    costs: tuple[float, ...]


def measure_cells(b: Any, formats: list[str], uncached: int) -> list[CellRow]:
    """Matrices whose cells all have the same number of blocks, at all of the benchmark's row counts."""
    n, k = CELLS_OF
    rows = []
    for name in (f for f in formats if f in FORMATS):
        views = {}
        for blocks in range(5):  # 0: dense
            keep = cells(n, k, blocks or 4)
            w = masked(name, keep)
            p = packing.pack(b.native, [w], target(name, [w]), blocks=blocks > 0)
            views[str(blocks)] = [Linear(v, n, k) for v in b.copies(p, max(2, uncached // p.nbytes))]
        for tokens in b.sizes:
            x = torch.randn(tokens, k)
            b.ops.linear(x, views["0"][0])
            start = time.perf_counter()
            b.ops.linear(x, views["0"][0])
            most = None if time.perf_counter() - start < 1e-3 else 1  # slower than memory: one copy suffices
            calls = {
                blocks: [lambda v=v, x=x: b.ops.linear(x, v) for v in some[:most]]
                for blocks, some in views.items()
            }
            took = interleaved(b, calls)
            costs = tuple(took[str(i)] / took["0"] for i in range(1, 5))
            rows.append(CellRow(f"{name} {n} x {k}", tokens, took["0"], costs))
        b.alive = []
    return rows


def measure(b: Any, formats: list[str], zeros: float, uncached: int) -> list[SparseRow]:
    """All rows of the requested formats."""
    rows = []
    for name in (f for f in formats if f in FORMATS):
        for n, k in SHAPES:
            rows += linear(b, name, n, k, zeros, uncached)
        rows += experts(b, name, zeros, uncached)
    return rows
