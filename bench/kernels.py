"""Every kernel of the CPU backend compared with the machine's limit.

    python bench/kernels.py --model L576 [--only linear|moe|mla|delta|head|sparse|cells|tiles] [--formats …]

Shapes are those of one model of random_model.py. Weights are copied until they exceed the caches, so that a
single row reads from memory, as in decoding. A row's limit is the longer of its bytes at the bandwidth and
its operations at the peak measured in the same run (FP8 and bfloat16: half the INT8 peak). Medians of
--passes; timings need a quiet machine. The last three of --only are in kernels_forms.py.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch

from farthing import _native
from farthing.ops.api import LatentCache, Norm, Place, StateCache
from farthing.ops.cpu import CpuOps, create
from farthing.ops.cpu.formats import pack, plan
from farthing.ops.cpu.weights import Experts, Heads, Linear, router_of
from farthing.ops.specs import AttentionSpec, DeltaParts, DeltaSpec, RouterSpec
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight, quantize_int4, quantize_int8
from harness import parser, report, timed
from limits import vector_peak
from random_model import SIZES, config

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
CONTEXTS = (128, 512, 4096)
UNCACHED = 160 << 20  # bytes of weights, more than any cache
BLOCK = 64
FORMATS = ["int4", "int8", "bf16", "fp8", "nl4"]  # nl4: what `--quantization int4` rounds to
HEADINGS = ("kernel", "rows", "us", "GB/s", "GOP/s", "of the limit")


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
        self.alive: list[torch.Tensor] = []

    def time(
        self, kernel: str, rows: int, calls: list[Callable[[], Any]], size: float, work: float, peak: float
    ) -> None:
        """Median over passes of one call of `calls`, which read `size` bytes and do `work` operations."""
        for call in calls[:2]:
            call()
        took = statistics.median(timed(calls, time.perf_counter, 0.02) for _ in range(self.passes))
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
        self.alive.append(buffer)
        return [self.native.view(buffer.data_ptr() + i * size, size, 0) for i in range(count)]

    def linears(self, packed: Any, n: int, k: int) -> list[Linear]:
        """Copies of a projection that exceed the caches together."""
        return [Linear(view, n, k) for view in self.copies(packed, max(2, UNCACHED // packed.nbytes))]

    def layers(self, spec: RouterSpec, gate: Any, up: Any, down: Any, extra: int = 1) -> list[Experts]:
        """Layers of copies of one expert, with `extra` shared ones, that exceed the caches together."""
        found, count = [], spec.num_experts + extra
        for _ in range(max(1, UNCACHED // ((up.nbytes + down.nbytes) * spec.num_experts))):
            native = _native.Moe(router_of(spec), gate, bool(extra))
            for pair in zip(self.copies(up, count), self.copies(down, count), strict=True):
                native.add(*pair)
            found.append(Experts(native, spec))
        return found

    def packed(self, name: str, weights: list[Weight], interleave: bool = False, blocks: bool = False) -> Any:
        """One matrix in the kernels' layout. blocks: in cells, whatever they cost."""
        target = plan(weights, "int4" if name == "nl4" else None)
        return pack(self.native, weights, target, interleave, blocks=blocks)

    def gate(self, experts: int, k: int) -> Any:
        """A router."""
        return self.packed("f32", [Weight("dense", torch.randn(experts, k) / k**0.5)])

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
        scale = torch.full((-(-n // 128), -(-k // 128)), 1 / 16)
        return Weight("fp8", (w * 16).to(torch.float8_e4m3fn), scale)
    return Weight("dense", w.bfloat16())


def linear(b: Bench, name: str, n: int, k: int) -> None:
    """A projection [n, k]."""
    packed = b.packed(name, [weight(name, n, k)])
    views = b.linears(packed, n, k)
    for rows in b.sizes:
        x = torch.randn(rows, k)
        calls = [lambda v=v, x=x: b.ops.linear(x, v) for v in (views if rows < 64 else views[:4])]
        b.time(f"linear {name} {n} x {k}", rows, calls, packed.nbytes, 2.0 * n * k * rows, b.peak(name))


def moe(b: Bench, name: str, size: str) -> None:
    """A layer's mixture of experts; random routing selects some of them."""
    c = config(size)
    d, i, e, k = (
        c[x] for x in ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    )
    spec = RouterSpec(e, k, c["n_group"], c["topk_group"], scale=2.5)
    gate_up = b.packed(name, [weight(name, i, d), weight(name, i, d)], interleave=True)
    down, gate = b.packed(name, [weight(name, d, i)]), b.gate(e, d)
    expert, norm = gate_up.nbytes + down.nbytes, Norm(torch.ones(d), 1e-6)
    layers = b.layers(spec, gate, gate_up, down)
    for rows in b.sizes:
        xs = [torch.randn(rows, d) for _ in range(16 if rows < 64 else 2)]
        counts = torch.zeros(e, dtype=torch.int64)
        touched = []
        for x in xs:
            counts.zero_()
            b.ops.moe(x, layers[0], norm, counts)
            touched.append(int((counts > 0).sum()) + 1)
        read = statistics.mean(touched) * expert + gate.nbytes
        calls = [lambda x=x, m=m: b.ops.moe(x, m, norm) for m in layers for x in xs]
        work = 2.0 * rows * d * (3 * i * (k + 1) + e)
        b.time(f"moe {name} {e} x {i} top {k}", rows, calls, read, work, b.peak(name))


def mla(b: Bench, size: str, weights: str) -> None:
    """Attention with `weights` as W_UK and W_UV: decode by context and batch, and a prompt."""
    c = config(size)
    names = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    h, n, r, v, latent = (c[name] for name in names)
    spec = AttentionSpec(h, n, r, v, latent, (n + r) ** -0.5)
    b.ops._quantization = None if weights == "bf16" else weights
    kv_b = Weight("dense", (torch.randn(h * (n + v), latent) / 16).bfloat16())
    loader = lambda: (kv_b, torch.ones(latent))  # noqa: E731
    handle = b.ops.pack_attention(f"attention.{weights}", spec, loader, torch.rand(2, 8192, r // 2))
    b.ops._quantization = None
    size_of = h * (n + v) * latent * (2 if weights == "bf16" else 1)
    for context in CONTEXTS:
        for batch in (1, 4, 16):
            new, cached = [1] * batch, [context - 1] * batch
            attend(b, spec, handle, f"mla {weights}, decode at {context}", new, cached, size_of)
    for tokens in (128, 512):
        attend(b, spec, handle, f"mla {weights}, prompt", [tokens], [0], size_of)


def attend(
    b: Bench, s: AttentionSpec, handle: Heads, name: str, new: list[int], cached: list[int], weights: int
) -> None:
    """One step of attention, cycling through the layers' caches. weights: bytes of the projections."""
    width, each = s.latent_dim + s.rope_dim, -(-(new[0] + cached[0]) // BLOCK)
    bytes_cached = sum(new + cached) * width * 2
    layers = max(1, min(16, UNCACHED // 4 // bytes_cached))
    cache = b.ops.new_cache(layers, each * len(new), BLOCK, width, "bfloat16")
    cache.data.normal_()
    batch = make_batch(new, cached, [list(range(i * each, (i + 1) * each)) for i in range(len(new))], BLOCK)
    tokens = sum(new)
    q = torch.randn(tokens, s.num_heads * (s.nope_dim + s.rope_dim))
    kv = torch.randn(tokens, width)
    pairs = sum(a * p + a * (a + 1) / 2 for a, p in zip(new, cached, strict=True))
    per_head = tokens * (s.nope_dim + s.value_dim) * s.latent_dim + pairs * (width + s.latent_dim)
    calls = [lambda i=i: b.ops.mla(q, kv, handle, Place(cache, i, batch)) for i in range(layers)]
    b.time(name, tokens, calls, weights + bytes_cached, 2.0 * s.num_heads * per_head, b.int8 / 2)


def delta(b: Bench) -> None:
    """Gated DeltaNet of Qwen3.6-35B-A3B: one token each of several sequences, whose states are read and
    written, and a prompt. Bytes are those of states, tails and activations."""
    s = DeltaSpec(16, 32, 128, 128, 4)
    heads = -torch.rand(32), torch.randn(32)
    parts = DeltaParts(torch.randn(s.width, s.channels), *heads, torch.ones(s.value_dim))
    handle = b.ops.pack_delta("delta", s, lambda: parts)
    state_bytes, inner = 4 * s.values * s.key_dim, s.channels + 2 * s.values
    for sequences, tokens in ((1, 1), (4, 1), (16, 1), (1, 16), (1, 512)):
        layers, rows = max(2, UNCACHED // (state_bytes * sequences)), sequences * tokens
        state = StateCache.new(b.ops, layers, sequences, s)
        for each in state.tensors():
            each.normal_()
        blocks, places = [[0] * 99] * sequences, list(range(sequences))
        batch = make_batch([tokens] * sequences, [100] * sequences, blocks, BLOCK, places)
        x, gates = torch.randn(rows, s.channels + s.values), torch.randn(rows, 2 * s.value_heads)
        cache = LatentCache(torch.empty(0), None, state=state)
        calls = [
            lambda i=i, c=cache, t=batch, x=x, g=gates: b.ops.delta(x, g, handle, Place(c, i, t))
            for i in range(layers)
        ]
        size = sequences * (2 * state_bytes + 4 * s.width * s.channels) + 4 * rows * inner
        name = f"delta {s.value_heads} x {s.key_dim} x {s.value_dim}, {'decode' if tokens == 1 else 'prompt'}"
        b.time(name, rows, calls, size, 8.0 * rows * s.values * s.key_dim, b.int8 / 4)


def head(b: Bench, name: str, size: str) -> None:
    """The output head with the argmax."""
    c = config(size)
    n, k = c["vocab_size"], c["hidden_size"]
    packed, norm = b.packed(name, [weight(name, n, k)]), Norm(torch.ones(k), 1e-6)
    views = b.linears(packed, n, k)
    for rows in (1, 8, 16):
        x = torch.randn(rows, k)
        calls = [lambda v=v, x=x: b.ops.top_logits(x, v, norm, 1) for v in views]
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


def main() -> None:
    """Parse, run, print."""
    p = parser(__doc__)
    p.add_argument("--model", choices=SIZES, default="L576")
    p.add_argument("--only", choices=["linear", "moe", "mla", "delta", "head", "sparse", "cells", "tiles"])
    p.add_argument("--small", action="store_true", help="sizes for emulated tiles, with --only tiles")
    p.add_argument("--zeros", type=float, default=0.4, help="share of zero blocks with --only sparse")
    p.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS[:4])
    p.add_argument("--rows", nargs="+", type=int, default=ROWS)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--isa", default="auto", help="instruction set: auto, avx512_vnni, avx2, portable, …")
    p.add_argument("--passes", type=int, default=5)
    a = p.parse_args()
    torch.manual_seed(0)
    b = Bench(a.threads, a.isa, a.passes, a.rows)
    title = f"{a.model}, {b.ops.name}: {b.read:.1f} GB/s, INT8 {b.int8:.0f} GOP/s"
    if a.only in ("sparse", "cells", "tiles"):
        import kernels_forms

        headings, rows = kernels_forms.measure(b, a)
        report([dict(zip(headings, row, strict=True)) for row in rows], a.json, title, headings, rows)
        return
    run(b, a)
    machine = {"read_gb_s": b.read, "int8_gop_s": b.int8}
    found = {"machine": machine, "rows": [asdict(r) for r in b.rows]}
    report(found, a.json, title, HEADINGS, [astuple(r) for r in b.rows])


if __name__ == "__main__":
    main()
