"""Compile every kernel to machine code for an absent GPU, with Triton's assembler, without running it.

    python tests/gpu/compile_kernels.py [--capability 89] [--all | --parse]  # a line of JSON per kernel

Uses the backend's launches at DeepSeek-V3's shapes, compiling each instead of launching it.
--capability: 80 (A100), 86 (A10, RTX 30), 89 (L40, RTX 40), 90 (H100), 100 (B200), 120 (RTX 50).
--all: every row count of the configuration files; default: the smallest and the largest.
--parse: only what Triton's language checks, for the smallest.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver, jit

from farthing.ops.api import Batch, IndexCache, LatentCache, Norm, OpenCache, Place, StateCache
from farthing.ops.compressed import Compressed, Streams
from farthing.ops.delta import Delta
from farthing.ops.sampling import Filters
from farthing.ops.selection import in_rows
from farthing.ops.specs import (
    CompressedParts,
    CompressedSpec,
    DeltaParts,
    DeltaSpec,
    IndexerSpec,
    PoolParts,
    RouterSpec,
    StreamParts,
    StreamSpec,
)
from farthing_gpu import attention as kernels
from farthing_gpu import compressed as pasts
from farthing_gpu import delta, hyper, launch, route, sample, sparse
from farthing_gpu import gemm as grouped
from farthing_gpu import route as indexer
from farthing_gpu import sample as normalize
from farthing_gpu import sample as softmax
from farthing_gpu.gemm import gemm
from farthing_gpu.matrix import Matrix

BF16, FP8, F32, I32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB per program (CUDA programming guide)
FP8_FROM = 89
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "cp.async")
HIDDEN, INNER, EXPERTS = 7168, 2048, 4


class Driver:
    """Replaces the driver on machines without a GPU."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def matrix(name: str, n: int, k: int, count: int = 1, dtype: torch.dtype = BF16) -> Matrix:
    """An uninitialized stack in the format's layout."""
    if name == "dense":
        return Matrix(name, torch.empty(count, n, k, dtype=dtype), None, None, n, k, 0)
    if name == "int8":
        data = torch.empty(count, n, k, dtype=torch.int8)
        return Matrix(name, data, torch.empty(count, n), None, n, k, 0)
    if name == "int4":
        data = torch.empty(count, n, k // 2, dtype=torch.uint8)
        return Matrix(name, data, torch.empty(count, n, k // 128), None, n, k, 128)
    if name == "int8_groups":
        data = torch.empty(count, n, k, dtype=torch.int8)
        return Matrix(name, data, torch.empty(count, n, k // 32), None, n, k, 32)
    data = torch.empty(count, n, k, dtype=FP8)
    return Matrix(name, data, torch.empty(count, n // 128, k // 128), None, n, k, 0)


def ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=I32)


def decoding() -> Batch:
    """A step of four sequences."""
    return Batch(ints(4), torch.zeros(4).long(), torch.arange(5).int(), ints(4), ints(4, 64), ints(4))


def products(sizes: list[int], fp8: bool) -> None:
    """Dense, grouped and sparse products."""
    kinds = [("dense", BF16), ("dense", F32), ("int8", BF16), ("int8", F32), ("int4", BF16), ("int4", F32)]
    for name, dtype in [*kinds, ("fp8", BF16)] if fp8 else kinds:
        w = matrix(name, INNER, HIDDEN, dtype=dtype)
        pair = matrix(name, 2 * INNER, HIDDEN, EXPERTS, dtype)
        down = matrix(name, HIDDEN, INNER, EXPERTS, dtype=dtype)
        for tokens in sizes:
            x = torch.empty(tokens, HIDDEN, dtype=FP8 if name == "fp8" else dtype)
            scale = torch.empty(tokens, HIDDEN // 128) if name == "fp8" else None
            gemm(x, w, torch.empty(tokens, INNER, dtype=dtype), scale)
            grouped.experts_mlp(
                x, scale, pair, down, ints(tokens * EXPERTS), ints(EXPERTS + 1), EXPERTS,
                torch.empty(tokens * EXPERTS), dtype,
            )  # fmt: skip
    x, gates = torch.empty(sizes[0], HIDDEN, dtype=BF16), torch.empty(sizes[0] * EXPERTS)
    for name in ("int4", "int8_groups"):  # columns in an order
        w, pair = (
            replace(m, order=ints(len(m.data), HIDDEN))
            for m in (matrix(name, INNER, HIDDEN), matrix(name, 2 * INNER, HIDDEN, EXPERTS))
        )
        down, tokens = matrix(name, HIDDEN, INNER, EXPERTS), (ints(len(gates)), ints(EXPERTS + 1))
        gemm(x, w, torch.empty(len(x), INNER, dtype=BF16))
        grouped.experts_mlp(x, None, pair, down, *tokens, EXPERTS, gates, BF16)
    for tokens in sizes:
        x, out = torch.empty(tokens, HIDDEN, dtype=BF16), torch.empty(tokens, INNER, dtype=BF16)
        values, places = (
            torch.empty(2, INNER, HIDDEN // 4, dtype=BF16),
            torch.empty(INNER, HIDDEN // 4).byte(),
        )
        sparse.multiply(x, sparse.TwoOfFour(values, places, None, INNER, HIDDEN), out)
        blocks = torch.empty(64, 16, 16, dtype=BF16)
        sparse.multiply(x, sparse.Blocks(blocks, ints(64), ints(INNER // 16 + 1), None, INNER, HIDDEN), out)


def attention(heads: list[int], spans: list[int], fp8: bool) -> None:
    """Decode over every kind of cache, prefill, and related kernels."""
    rope = torch.empty(2, 4096, 32)
    kinds = [(BF16, BF16), (F32, F32), (torch.int8, BF16)]
    for kind, dtype in [*kinds, (FP8, BF16)] if fp8 else kinds:
        scale = None if kind.itemsize > 1 else torch.empty(1, 64, 64, 2)
        cache = LatentCache(torch.empty(1, 64, 64, 576, dtype=kind), scale)
        kv, slots = torch.empty(4, 576, dtype=dtype), torch.zeros(4, dtype=torch.int64)
        kernels.write_latent(kv, torch.empty(512), 1e-6, ints(4), rope, True, cache, 0, slots)
        kernels.gather(cache, 0, ints(4, 16), [5, 6], 512, dtype)
        for h in heads:
            kernels.rotate_queries(torch.empty(4, h * 192, dtype=dtype), ints(4), rope, h, 128, 64, True)
            q, pe = torch.empty(4, h, 512, dtype=dtype), torch.empty(4, h, 64, dtype=dtype)
            kernels.decode(q, pe, cache, 0, ints(4, 16), ints(4), ints(4), 0.1, splits=64)
            kernels.decode(q, pe, in_rows(cache), 0, ints(4, 2048), ints(4), ints(4), 0.1, splits=8)
        keys = IndexCache(
            torch.empty(1, 64, 64, 128, dtype=kind), None if scale is None else torch.empty(1, 64, 64)
        )
        batch = Batch(ints(4), slots, ints(5), ints(4), ints(4, 64))
        for h in (32, 64):  # GLM-5's and V3.2's
            q = torch.empty(4, h, 128, dtype=dtype)
            indexer.scores(q, torch.empty(4, h), keys, 0, batch, ints(4), slice(0, 4))
    h = 16
    for t in spans:
        for dtype in (BF16, F32):
            kernels.prefill(
                torch.empty(t, h * 192, dtype=dtype), torch.empty(t, h, 64, dtype=dtype),
                torch.empty(t, h * 256, dtype=dtype), torch.empty(t, 64, dtype=dtype),
                torch.empty(t, h * 128, dtype=dtype), [(0, t)], ints(1), [t], 0.1, (h, 128, 64, 128),
            )  # fmt: skip


def past(kind: torch.dtype, rate: int, index: IndexerSpec | None) -> tuple[Compressed, LatentCache]:
    """A layer of DeepSeek-V4-Flash, and its cache."""
    spec = CompressedSpec(64, 512, 64, 128, rate, index)
    pools = tuple(PoolParts(torch.empty(max(1, rate), n), torch.empty(n)) for n in spec.pooled)
    parts = CompressedParts(torch.empty(512), torch.empty(64), pools)

    def store(size: int, width: int, *pitch: int) -> tuple[Tensor, Tensor | None]:
        data = torch.empty(1, 256, size, width, dtype=kind)
        return data, None if kind.itemsize > 1 else torch.empty(1, 256, size, *pitch)

    cache, own = (LatentCache(torch.empty(0, 64, 128, 512), None) for _ in range(2))
    data, scale = store(128, 512, 2)  # the entries are in the memory of these
    own.entries[rate] = LatentCache(data[:, :64], None if scale is None else scale[:, :64])
    cache.windows[128] = own
    if rate:
        cache.entries[rate] = LatentCache(*store(128 // rate, 512, 2))
        cache.open = OpenCache({rate: torch.empty(1, 4, spec.open_tokens, 2 * sum(spec.pooled))})
    if index is not None:
        cache.index = IndexCache(*store(128 // rate, index.head_dim))
    return Compressed(spec, parts, torch.empty(2, 4096, 32)), cache


def compressed(fp8: bool) -> None:
    """DeepSeek-V4-Flash's attention of each kind over every kind of cache."""
    index = IndexerSpec(64, 128, 64, 512, interleaved=True)
    kinds = [(BF16, BF16), (F32, F32), (torch.int8, BF16)]
    for kind, dtype in [*kinds, (FP8, BF16)] if fp8 else kinds:
        for rate, selects in ((0, None), (4, index), (128, None)):
            heads, cache = past(kind, rate, selects)
            x = torch.empty(4, 512 + 2 * sum(heads.spec.pooled) + (64 if selects else 0), dtype=dtype)
            q, index_q = torch.empty(4, 64 * 512, dtype=dtype), torch.empty(4, 64 * 128, dtype=dtype)
            pasts.attend(q, x, index_q if selects else None, heads, Place(cache, 0, decoding()))


def streams() -> None:
    """DeepSeek-V4-Flash's hyper-connections, in a layer and at the end."""
    x, y = torch.empty(4, 4 * 4096, dtype=BF16), torch.empty(4, 4096, dtype=BF16)
    for n, scales in ((24, 3), (4, 1)):
        parts = StreamParts(torch.empty(n, 4 * 4096), torch.empty(n), torch.empty(scales))
        _, mix = hyper.collapse(x, Streams(StreamSpec(4, 20, 1e-6), parts))
        if scales == 3:
            hyper.spread(x, y, mix, 4)


def recurrence() -> None:
    """Gated DeltaNet of Qwen3-Next."""
    spec = DeltaSpec(16, 32, 128, 128, 4)
    parts = DeltaParts(torch.empty(4, spec.channels), torch.empty(32), torch.empty(32), torch.empty(128))
    cache = LatentCache(torch.empty(0, 1, 1, 1), None)
    cache.state = StateCache(*(torch.empty(1, 4, *each) for each in spec.state))
    x = torch.empty(4, spec.channels + spec.values, dtype=BF16)
    delta.advance(x, torch.empty(4, 64, dtype=BF16), Delta(spec, parts), Place(cache, 0, decoding()))


def rows(fp8: bool) -> None:
    """Everything that works on rows of tokens."""
    x = torch.empty(4, HIDDEN, dtype=BF16)
    normalize.rms_norm(x, Norm(torch.empty(HIDDEN), 1e-6))
    if fp8:
        normalize.quantize(x, Norm(torch.empty(HIDDEN), 1e-6))
    spec = RouterSpec(256, 8, 8, 4, scale=2.5)
    ids, _ = route.route(torch.empty(4, 256), torch.empty(256), spec)
    route.sort_by_expert(ids, 256)
    grouped.combine(torch.empty(32, HIDDEN, dtype=BF16), ids, None, x, x)
    softmax.softmax(torch.empty(4, 4096))
    logits = torch.empty(4, 129280)
    softmax.softmax(logits)
    uniform = torch.empty(4, dtype=torch.float64)
    sample.sample_tokens(logits, uniform)
    sample.sample_filtered(logits, uniform, Filters(torch.ones(4).long(), torch.ones(4), torch.ones(4)))


def resources(kernel: Any) -> dict[str, Any]:
    """Registers, bytes spilled to the stack, shared memory and relevant instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": [name for name in INSTRUCTIONS if name in ptx],
    }


class Parsed(Exception):
    """A kernel is in Triton's language."""


def stop(*_: Any) -> None:
    """Replaces a compiler's first stage."""
    raise Parsed


def compiled(capability: int, every: bool, parse: bool = False) -> Iterator[tuple[str, Any]]:
    """(name, kernel) of every launch of the backend; parse: without compiling it, None in place of it."""
    seen: dict[str, tuple[str, Any]] = {}
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        except Parsed:
            seen[self.__name__] = (self.__name__, None)
            return None
        seen[kernel.hash] = (self.__name__, kernel)
        return kernel

    if parse:
        CUDABackend.add_stages = lambda self, stages, *_: stages.update(ttir=stop)
    driver.set_active(Driver(capability))
    jit.JITFunction.run = compile_only
    launch._NONE = launch.Card(f"capability {capability}", 132, SHARED[capability] << 10, capability // 10)
    fp8 = capability >= FP8_FROM
    products([8, 64, 512] if every else [8] if parse else [8, 512], fp8)
    attention([16, 32, 128] if every else [16], [64, 512] if every else [512], fp8)
    compressed(fp8)
    streams()
    recurrence()
    rows(fp8)
    yield from seen.values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--capability", type=int, choices=SHARED, default=90)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--parse", action="store_true")
    options = parser.parse_args()
    for name, kernel in compiled(options.capability, options.all, options.parse):
        found = {} if kernel is None else {**resources(kernel), "limit": SHARED[options.capability] << 10}
        print(json.dumps({"kernel": name.removeprefix("_"), **found}), flush=True)


if __name__ == "__main__":
    main()
