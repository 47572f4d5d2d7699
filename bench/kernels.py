"""Every kernel of the CPU backend compared with the machine's limit.

    python bench/kernels.py --model L576 [--only linear|moe|mla|delta|head|sparse|cells|tiles] [--formats …]

Shapes are those of one model of random_model.py. Weights are copied until they exceed the caches, so that a
single row reads from memory, as in decoding. A row's limit is the longer of its bytes at the bandwidth and
its operations at the peak measured in the same run (FP8 and bfloat16: half the INT8 peak). Medians of
--passes; timings need a quiet machine. `--only sparse` compares block-sparse matrices with dense ones,
`--only cells` the cells that they are made of, for the costs in `ops/weights.py`.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farthing import _native
from farthing.ops.api import LatentCache, Norm, Place
from farthing.ops.cpu import CpuOps, create
from farthing.ops.cpu.formats import pack, plan
from farthing.ops.cpu.weights import Experts, Heads, Linear, router_of
from farthing.ops.specs import AttentionSpec, DeltaParts, DeltaSpec, RouterSpec
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight, quantize_int4, quantize_int8
from kernels_sparse import PATTERNS, CellRow, SparseRow, measure, measure_cells
from kernels_tiles import crossing, measure_tiles, tile_table
from limits import vector_peak
from random_model import SIZES, config

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
CONTEXTS = (128, 512, 4096)
UNCACHED = 160 << 20  # bytes of weights, more than any cache
BLOCK = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel, one size."""

    kernel: str
    rows: int
    microseconds: float
    gb_s: float
    gop_s: float
    share: float  # of the limit


class Bench:
    """A backend, the machine's limits and the measurements."""

    def __init__(self, threads: int, isa: str, passes: int, sizes: list[int]) -> None:
        torch.set_num_threads(1)
        self.ops = CpuOps(threads, isa=isa) if isa != "auto" else create(None, threads, None, None)
        self.native = self.ops._native
        self.threads, self.passes, self.sizes = threads, passes, sizes
        self.read = _native.read_bandwidth(threads, 1 << 30)
        self.int8 = vector_peak(threads, isa)
        self.rows: list[Row] = []

    def time(
        self, kernel: str, rows: int, calls: list[Callable[[], Any]], size: float, work: float, peak: float
    ) -> None:
        """Median over passes of one call of `calls`, measured interleaved."""
        for call in calls[:2]:
            call()
        seconds, rounds = [], max(1, 20_000_000 // int(1 + len(calls) * (size + work / 30)))
        for _ in range(self.passes):
            start = time.perf_counter()
            for _ in range(rounds):
                for call in calls:
                    call()
            seconds.append((time.perf_counter() - start) / (rounds * len(calls)))
        took = statistics.median(seconds)
        least = max(size / self.read, work / peak) / 1e9
        self.rows.append(Row(kernel, rows, took * 1e6, size / took / 1e9, work / took / 1e9, least / took))

    def copies(self, packed: Any, count: int) -> list[Any]:
        """Views of `count` copies of a packed matrix in large pages."""
        size = -(-packed.serialized_bytes // 64) * 64
        memory = mmap.mmap(-1, size * count)
        memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        packed.serialize(buffer.data_ptr(), 0)
        for i in range(1, count):
            buffer[i * size :][:size] = buffer[:size]
        self.alive = [*getattr(self, "alive", []), buffer]
        return [self.native.view(buffer.data_ptr() + i * size, size, 0) for i in range(count)]

    def packed(self, name: str, weights: list[Weight], interleave: bool = False) -> Any:
        """One matrix in the kernels' layout; "nl4" is what `--quantization int4` rounds to."""
        target = plan(weights, "int4" if name == "nl4" else None)
        return pack(self.native, weights, target, interleave)

    def peak(self, name: str) -> float:
        """Peak GOP/s of the format's arithmetic."""
        return self.int8 / (2 if name in ("bf16", "fp8") else 1)


def weight(name: str, n: int, k: int) -> Weight:
    """A random matrix in one storage format."""
    w = torch.randn(n, k) / k**0.5
    if name == "int8":
        return quantize_int8(w)
    if name == "int4":
        return quantize_int4(w, 64)
    if name == "fp8":
        return Weight(
            "fp8", (w * 16).to(torch.float8_e4m3fn), torch.full((-(-n // 128), -(-k // 128)), 1 / 16)
        )
    return Weight("dense", w.bfloat16())


def linear(b: Bench, name: str, n: int, k: int) -> None:
    """A projection [n, k]."""
    packed = b.packed(name, [weight(name, n, k)])
    size = packed.nbytes
    views = [Linear(v, n, k) for v in b.copies(packed, max(2, UNCACHED // size))]
    for rows in b.sizes:
        x = torch.randn(rows, k)
        some = views if rows < 64 else views[:4]
        calls = [lambda v=v, x=x: b.ops.linear(x, v) for v in some]
        b.time(f"linear {name} {n} x {k}", rows, calls, size, 2.0 * n * k * rows, b.peak(name))


def moe(b: Bench, name: str, size: str) -> None:
    """A layer's mixture of experts; random routing selects some of them."""
    c = config(size)
    d, i, e, k = (
        c[x] for x in ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    )
    spec = RouterSpec(e, k, c["n_group"], c["topk_group"], scale=2.5)
    gate_up = b.packed(name, [weight(name, i, d), weight(name, i, d)], interleave=True)
    down = b.packed(name, [weight(name, d, i)])
    gate = b.ops.pack_linear(f"{name}.gate", lambda: [Weight("dense", torch.randn(e, d) / d**0.5)]).packed
    expert = gate_up.nbytes + down.nbytes
    layers = []
    for _ in range(max(1, UNCACHED // (expert * e))):
        native = _native.Moe(router_of(spec), gate, True)
        for pair in zip(b.copies(gate_up, e + 1), b.copies(down, e + 1), strict=True):
            native.add(*pair)
        layers.append(Experts(native, spec))
    norm = torch.ones(d)
    for rows in b.sizes:
        xs = [torch.randn(rows, d) for _ in range(16 if rows < 64 else 2)]
        counts = torch.zeros(e, dtype=torch.int64)
        touched = []
        for x in xs:
            counts.zero_()
            b.ops.moe(x, layers[0], Norm(norm, 1e-6), counts)
            touched.append(int((counts > 0).sum()) + 1)
        read = statistics.mean(touched) * expert + gate.nbytes
        calls = [lambda x=x, m=m: b.ops.moe(x, m, Norm(norm, 1e-6)) for m in layers for x in xs]
        work = 2.0 * rows * d * (3 * i * (k + 1) + e)
        b.time(f"moe {name} {e} x {i} top {k}", rows, calls, read, work, b.peak(name))


def mla(b: Bench, size: str, weights: str) -> None:
    """Attention with `weights` as W_UK and W_UV: decode by context and batch, and a prompt."""
    c = config(size)
    h, n, r, v, latent = (
        c[x]
        for x in (
            "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank",
        )
    )  # fmt: skip
    spec = AttentionSpec(h, n, r, v, latent, (n + r) ** -0.5)
    b.ops._quantization = None if weights == "bf16" else weights
    kv_b = Weight("dense", (torch.randn(h * (n + v), latent) / 16).bfloat16())
    loader = lambda: (kv_b, torch.ones(latent))  # noqa: E731
    handle = b.ops.pack_attention(f"attention.{weights}", spec, loader, torch.rand(2, 8192, r // 2))
    b.ops._quantization = None
    projections = h * (n + v) * latent * (2 if weights == "bf16" else 1)
    for context in CONTEXTS:
        for batch in (1, 4, 16):
            attend(
                b,
                spec,
                handle,
                f"mla {weights}, decode at {context}",
                [1] * batch,
                [context - 1] * batch,
                projections,
            )
    for tokens in (128, 512):
        attend(b, spec, handle, f"mla {weights}, prompt", [tokens], [0], projections)


def attend(
    b: Bench,
    s: AttentionSpec,
    handle: Heads,
    name: str,
    new: list[int],
    cached: list[int],
    projections: int,
) -> None:
    """One step of attention, cycling through the layers' caches."""
    width = s.latent_dim + s.rope_dim
    each = -(-(new[0] + cached[0]) // BLOCK)
    bytes_cached = sum(new + cached) * width * 2
    layers = max(1, min(16, UNCACHED // 4 // bytes_cached))
    cache = b.ops.new_cache(layers, each * len(new), BLOCK, width, "bfloat16")
    cache.data.normal_()
    batch = make_batch(new, cached, [list(range(i * each, (i + 1) * each)) for i in range(len(new))], BLOCK)
    tokens = sum(new)
    q = torch.randn(tokens, s.num_heads * (s.nope_dim + s.rope_dim))
    kv = torch.randn(tokens, width)
    pairs = sum(a * p + a * (a + 1) / 2 for a, p in zip(new, cached, strict=True))
    work = (
        2.0
        * s.num_heads
        * (tokens * (s.nope_dim + s.value_dim) * s.latent_dim + pairs * (width + s.latent_dim))
    )
    calls = [lambda i=i: b.ops.mla(q, kv, handle, Place(cache, i, batch)) for i in range(layers)]
    b.time(name, tokens, calls, projections + bytes_cached, work, b.int8 / 2)


def delta(b: Bench) -> None:
    """Gated DeltaNet of Qwen3.6-35B-A3B: one token each of several sequences, whose states are read and
    written, and a prompt. Bytes are those of states, tails and activations."""
    s = DeltaSpec(16, 32, 128, 128, 4)
    parts = DeltaParts(
        torch.randn(s.width, s.channels), -torch.rand(32), torch.randn(32), torch.ones(s.value_dim)
    )
    handle = b.ops.pack_delta("delta", s, lambda: parts)
    state_bytes = 4 * s.values * s.key_dim
    for sequences, tokens in ((1, 1), (4, 1), (16, 1), (1, 16), (1, 512)):
        layers = max(2, UNCACHED // (state_bytes * sequences))
        state = b.ops.new_state(layers, sequences, s)
        for each in state.tensors():
            each.normal_()
        batch = make_batch(
            [tokens] * sequences, [100] * sequences, [[0] * 99] * sequences, BLOCK, list(range(sequences))
        )
        rows = sequences * tokens
        x, gates = torch.randn(rows, s.channels + s.values), torch.randn(rows, 2 * s.value_heads)
        cache = LatentCache(torch.empty(0), None, state=state)
        calls = [
            lambda i=i, c=cache, t=batch, x=x, g=gates: b.ops.delta(x, g, handle, Place(c, i, t))
            for i in range(layers)
        ]
        size = sequences * (2 * state_bytes + 4 * s.width * s.channels) + 4 * rows * (
            s.channels + 2 * s.values
        )
        work = 8.0 * rows * s.values * s.key_dim
        name = "decode" if tokens == 1 else "prompt"
        b.time(
            f"delta {s.value_heads} x {s.key_dim} x {s.value_dim}, {name}",
            rows,
            calls,
            size,
            work,
            b.int8 / 4,
        )


def head(b: Bench, name: str, size: str) -> None:
    """The output head with the argmax."""
    c = config(size)
    n, k = c["vocab_size"], c["hidden_size"]
    packed = b.packed(name, [weight(name, n, k)])
    views = [Linear(v, n, k) for v in b.copies(packed, max(2, UNCACHED // packed.nbytes))]
    norm = torch.ones(k)
    for rows in (1, 8, 16):
        x = torch.randn(rows, k)
        calls = [lambda v=v, x=x: b.ops.top_logits(x, v, Norm(norm, 1e-6), 1) for v in views]
        b.time(f"head {name} {n} x {k}", rows, calls, packed.nbytes, 2.0 * n * k * rows, b.peak(name))


def shapes(size: str) -> Iterator[tuple[int, int]]:
    """[n, k] of the projections of a layer: queries and latent, queries, output."""
    c = config(size)
    d, rank, h = c["hidden_size"], c["q_lora_rank"], c["num_attention_heads"]
    yield rank + c["kv_lora_rank"] + c["qk_rope_head_dim"], d
    yield h * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]), rank
    yield d, h * c["v_head_dim"]


def run(b: Bench, a: argparse.Namespace) -> None:
    """Run the requested benchmarks."""
    for name in a.formats:
        if a.only in (None, "linear"):
            for n, k in shapes(a.model):
                linear(b, name, n, k)
        if a.only in (None, "moe"):
            moe(b, name, a.model)
        if a.only in (None, "head"):
            head(b, name, a.model)
        b.alive = []
    if a.only in (None, "delta"):
        delta(b)
    if a.only in (None, "mla"):
        for name in a.formats:
            if name not in ("fp8", "nl4"):  # attention is never in these
                mla(b, a.model, name)


def sparse_table(rows: list[SparseRow], b: Bench, zeros: float) -> Table:
    """Microseconds of every pattern, speed and size relative to dense."""
    table = Table(
        "kernel", "rows", *PATTERNS, title=f"{b.ops.name}, {zeros:.0%} zeros: us (speed, size; dense = 1)"
    )
    for r in rows:
        cells = [f"{r.microseconds['dense']:.1f}"] + [
            f"{r.microseconds[p]:.1f} ({r.speedup(p):.2f}x, {r.size(p):.2f})"
            for p in PATTERNS
            if p != "dense"
        ]
        table.add_row(r.kernel, str(r.rows), *cells)
    return table


def cells_table(rows: list[CellRow], b: Bench) -> Table:
    """Costs of cells by their number of blocks."""
    table = Table("kernel", "rows", "dense, us", "1", "2", "3", "4", title=f"{b.ops.name}: time of a cell")
    for r in rows:
        table.add_row(r.kernel, str(r.rows), f"{r.dense_us:.1f}", *(f"{c:.2f}" for c in r.costs))
    return table


def sparse(b: Bench, a: argparse.Namespace) -> None:
    """Block-sparse matrices, or their cells."""
    found: list[Any] = (
        measure(b, a.formats, a.zeros, UNCACHED)
        if a.only == "sparse"
        else measure_cells(b, a.formats, UNCACHED)
    )
    if a.json:
        print(json.dumps([asdict(r) for r in found]))
        return
    table = sparse_table(found, b, a.zeros) if a.only == "sparse" else cells_table(found, b)
    Console(width=110).print(table)


def tiles(b: Bench, a: argparse.Namespace) -> None:
    """Products on AMX tiles, and from how many rows on they pay."""
    many, few = measure_tiles(b, a.formats, a.small)
    if a.json:
        print(json.dumps([asdict(r) for r in many + few]))
        return
    console = Console(width=110)
    console.print(tile_table(many, b))
    for _, rows in groupby(few, key=lambda r: r.kernel):
        console.print(crossing(list(rows)))


def main() -> None:
    """Parse, run, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="L576")
    p.add_argument("--only", choices=["linear", "moe", "mla", "delta", "head", "sparse", "cells", "tiles"])
    p.add_argument("--small", action="store_true", help="sizes for emulated tiles, with --only tiles")
    p.add_argument("--zeros", type=float, default=0.4, help="share of zero blocks with --only sparse")
    p.add_argument(
        "--formats",
        nargs="+",
        choices=["int4", "int8", "bf16", "fp8", "nl4"],
        default=["int4", "int8", "bf16", "fp8"],
    )
    p.add_argument("--rows", nargs="+", type=int, default=ROWS)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--isa", default="auto", help="instruction set: auto, avx512_vnni, avx2, portable, …")
    p.add_argument("--passes", type=int, default=5)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    torch.manual_seed(0)
    b = Bench(a.threads, a.isa, a.passes, a.rows)
    if a.only in ("sparse", "cells"):
        sparse(b, a)
        return
    if a.only == "tiles":
        tiles(b, a)
        return
    run(b, a)
    machine = {"read_gb_s": b.read, "int8_gop_s": b.int8}
    if a.json:
        print(json.dumps({"machine": machine, "rows": [asdict(r) for r in b.rows]}))
        return
    table = Table(
        "kernel",
        "rows",
        "us",
        "GB/s",
        "GOP/s",
        "of the limit",
        title=f"{a.model}, {b.ops.name}: {b.read:.1f} GB/s, INT8 {b.int8:.0f} GOP/s",
    )
    for r in b.rows:
        table.add_row(
            r.kernel,
            str(r.rows),
            f"{r.microseconds:.1f}",
            f"{r.gb_s:.1f}",
            f"{r.gop_s:.0f}",
            f"{r.share:.0%}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
