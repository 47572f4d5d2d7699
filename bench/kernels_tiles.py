"""Products on AMX tiles beside the units' peak, the exact form and oneDNN, and where the forms cross.

`python bench/kernels.py --only tiles`. Both forms run on the same instruction set: in blocks of columns, and
as `--deterministic` computes: integers on vectors, bfloat16 on tiles too, with activations in two halves.
They take turns; a figure is the median over passes. oneDNN runs after them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from farthing import _native
from farthing.ops.api import Norm
from farthing.ops.cpu.weights import Experts, Linear, router_of
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import Weight, quantize_int8

if TYPE_CHECKING:
    from kernels import Bench

FEW = (4, 6, 8, 12, 16, 24, 32, 48, 64)
EXPERTS = RouterSpec(32, 4)


@dataclass(frozen=True, slots=True)
class TileRow:
    """One product; GOP/s."""

    kernel: str
    rows: int
    blocks: float
    exact: float
    onednn: float  # int8, weights prepacked by torch; 0: not measured
    peak: float  # of the tiles in that format, by a measurement in INT8; 0: unknown, as where emulated


def gop_s(calls: Sequence[Callable[[], Any]], work: float, passes: int) -> list[float]:
    """Of each call, in turns."""
    took: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(passes):
        for times, call in zip(took, calls, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [work / statistics.median(times) / 1e9 for times in took]


def forms(b: Bench, call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """The call in blocks of columns whatever its rows, and in the exact form."""

    def of(least: int) -> Callable[[], Any]:
        def run() -> None:
            b.native.tile_tokens = least
            call()

        return run

    return [of(1), of(0)]


def onednn(w: torch.Tensor, x: torch.Tensor) -> Callable[[], Any] | None:
    """torch's int8 product with weights that oneDNN packed, rounding its input as it comes."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        return None
    torch.backends.quantized.engine = "onednn"
    scale = float(w.abs().max()) / 127
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(w, scale, 0, torch.qint8), None)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed)


def products(b: Bench, formats: Sequence[str], n: int, ks: Sequence[int], rows: int) -> list[TileRow]:
    """One projection of many rows."""
    peak, found = _native.peak_ops("amx_int8", b.threads), []
    for name in formats:
        for k in ks:
            w, x = torch.randn(n, k) / k**0.5, torch.randn(rows, k)
            handle = Linear(b.packed("nl4" if name == "int4" else name, [of_format(name, w)]), n, k)
            calls = forms(b, lambda x=x, h=handle: b.ops.linear(x, h))
            peer = onednn(w, x) if name == "int8" else None
            work, theirs = 2.0 * n * k * rows, 0.0
            ours = gop_s(calls, work, b.passes)
            if peer is not None:  # after ours: torch's threads spin for a while
                torch.set_num_threads(b.threads)
                (theirs,) = gop_s([peer], work, b.passes)
                torch.set_num_threads(1)
            most = peak / 2 if name == "bf16" else peak  # a tile has half as many bfloat16
            found.append(TileRow(f"{name} {n} x {k}", rows, *ours, theirs, most))
    return found


def crossings(b: Bench, formats: Sequence[str], n: int, k: int) -> list[TileRow]:
    """A projection of few rows, and experts that have as many on average."""
    found, norm = [], Norm(torch.ones(k), 1e-6)
    for name in formats:
        stored = "nl4" if name == "int4" else name
        dense = Linear(b.packed(stored, [of_format(name, torch.randn(n, k) / k**0.5)]), n, k)
        native = _native.Moe(router_of(EXPERTS), gate(b, k), False)
        for _ in range(EXPERTS.num_experts):
            up = [of_format(name, torch.randn(n // 4, k) / k**0.5) for _ in range(2)]
            down = of_format(name, torch.randn(k, n // 4) / n**0.5)
            native.add(b.packed(stored, up, interleave=True), b.packed(stored, [down]))
        experts, each = Experts(native, EXPERTS), EXPERTS.num_experts // EXPERTS.top_k
        for rows in FEW:
            x, tokens = torch.randn(rows, k), torch.randn(rows * each, k)
            of_dense = gop_s(forms(b, lambda x=x, h=dense: b.ops.linear(x, h)), 2.0 * n * k * rows, b.passes)
            work = 2.0 * 3 * (n // 4) * k * rows * EXPERTS.num_experts
            of_experts = gop_s(forms(b, lambda x=tokens, m=experts: b.ops.moe(x, m, norm)), work, b.passes)
            found.append(TileRow(f"{name} {n} x {k}", rows, *of_dense, 0.0, 0.0))
            found.append(TileRow(f"{name} experts, rows each", rows, *of_experts, 0.0, 0.0))
    return sorted(found, key=lambda r: r.kernel)


def of_format(name: str, w: torch.Tensor) -> Weight:
    return quantize_int8(w) if name == "int8" else Weight("dense", w.bfloat16())


def gate(b: Bench, k: int) -> Any:
    weight = Weight("dense", torch.randn(EXPERTS.num_experts, k) / k**0.5)
    return b.packed("f32", [weight])


def crossing(rows: Sequence[TileRow]) -> str:
    """From how many rows on blocks are at least as fast as the exact form."""
    slower = [r.rows for r in rows if r.blocks < r.exact]
    later = [r.rows for r in rows if r.rows > max(slower, default=0)]
    return f"{rows[0].kernel}: blocks from {min(later)} rows on" if later else f"{rows[0].kernel}: exact"


def tile_table(rows: Sequence[TileRow], b: Bench) -> Table:
    """GOP/s, and shares of the tiles' peak."""
    title = f"{b.ops.name}: GOP/s; INT8 on vectors {b.int8:,.0f}"
    table = Table("kernel", "rows", "blocks", "tiles' peak", "of it", "exact", "oneDNN", title=title)
    for r in rows:
        table.add_row(
            r.kernel,
            str(r.rows),
            f"{r.blocks:.0f}",
            f"{r.peak:,.0f}" if r.peak else "",
            f"{r.blocks / r.peak:.0%}" if r.peak else "",
            f"{r.exact:.0f}",
            f"{r.onednn:.0f}" if r.onednn else "",
        )
    return table


def measure_tiles(
    b: Bench, formats: Sequence[str], small: bool = False
) -> tuple[list[TileRow], list[TileRow]]:
    """Many rows, then few. small: sizes for emulated tiles."""
    if "amx" not in _native.instruction_sets().split() or b.native.isa != "amx":
        raise SystemExit(f"--only tiles: got instruction set {b.native.isa}; expected a processor with AMX")
    known = [f for f in formats if f in ("int4", "int8", "bf16")]
    n, ks, rows, few = (64, [128], 64, 128) if small else (4096, [1024, 7168], 512, 2048)
    least = b.native.tile_tokens
    try:
        return products(b, known, n, ks, rows), crossings(b, known, n, few)
    finally:
        b.native.tile_tokens = least
