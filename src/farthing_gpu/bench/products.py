"""Products and rows: one function per line of the table, each with torch's own implementation.

Shapes are DeepSeek-V3's unless the row says otherwise. Nothing here runs without a GPU.
Legend: D hidden, I intermediate, E experts, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.api import Norm
from farthing.ops.reference import route as reference_route
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import Weight, quantize_int4, quantize_int8
from farthing_gpu import gemm, route, sample, sparse
from farthing_gpu.matrix import Matrix, pack

CUDA = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
Ceiling = Literal["copy", "bf16", "fp8"]


@dataclass(frozen=True, slots=True)
class Work:
    """One workload. bytes: minimum traffic; flops: required operations.

    `run` takes a configuration if its kernel has a choice (`tune.py`), else nothing.
    """

    run: Callable[..., object]
    ceiling: Ceiling
    bytes: float = 0.0
    flops: float = 0.0
    peer: Callable[[], object] | None = None
    peer_name: str = ""


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Normal random numbers on the device."""
    return torch.randn(*shape, device=CUDA, dtype=torch.float32).to(dtype)


def fp8_matrix(n: int, k: int, count: int = 1) -> Matrix:
    """Random FP8 weights with random scales."""
    data = torch.empty(count, n, k, dtype=FP8, device=CUDA)
    for part in data:
        part.copy_(normal(n, k))
    scale = torch.rand(count, math.ceil(n / 128), math.ceil(k / 128), device=CUDA) / k**0.5
    return Matrix("fp8", data, scale, None, n, k)


# -- products


def dense_fp8(m: int, n: int, k: int) -> Work:
    """Block-scaled FP8; torch's path is its own 1 x 128 by 128 x 128 scaling."""
    w = fp8_matrix(n, k)
    x, scale = sample.quantize(normal(m, k))
    out = torch.empty(m, n, dtype=BF16, device=CUDA)
    assert w.scale is not None
    # torch's scale layout: column-major for activations, transposed for weights.
    a_scale, b_scale = scale.t().contiguous().t(), w.scale[0].contiguous().t()

    def peer() -> Tensor:
        return torch._scaled_mm(x, w.data[0].t(), a_scale, b_scale, out_dtype=BF16)  # type: ignore[no-any-return]

    return Work(
        lambda choice=None: gemm.gemm(x, w, out, scale, choice=choice), "fp8", m * k + n * k + 2 * m * n,
        2.0 * m * n * k, peer, "torch._scaled_mm, block scales",
    )  # fmt: skip


def packed(name: str, n: int, k: int) -> Matrix:
    """Random weights in any format except FP8."""
    w = torch.randn(n, k)
    if name == "dense":
        return pack(Weight("dense", w), BF16, CUDA)
    return pack(quantize_int8(w) if name == "int8" else quantize_int4(w, 128), BF16, CUDA)


def linear(name: str, tokens: int, n: int, k: int) -> Work:
    """A projection of bfloat16 inputs; with few tokens it is bound by the weights' bytes."""
    w, x, dense = packed(name, n, k), normal(tokens, k), normal(n, k)
    out = torch.empty(tokens, n, dtype=BF16, device=CUDA)
    return Work(
        lambda choice=None: gemm.gemm(x, w, out, choice=choice), "bf16" if tokens >= 512 else "copy",
        w.nbytes, 2.0 * tokens * n * k, lambda: F.linear(x, dense), "torch bf16 linear",
    )  # fmt: skip


def experts(name: str, tokens: int, total: int, top_k: int, d: int, inner: int) -> Work:
    """Gate, up and down of every slot, with evenly selected experts; torch loops over experts in bfloat16."""
    if name == "fp8":
        gate_up, down = fp8_matrix(2 * inner, d, total), fp8_matrix(d, inner, total)
        x, scale = sample.quantize(normal(tokens, d))
    else:
        gate_up, down = (_repeated(packed(name, n, k), total) for n, k in ((2 * inner, d), (d, inner)))
        x, scale = normal(tokens, d), None
    ids = torch.stack([torch.randperm(total, device=CUDA)[:top_k] for _ in range(tokens)])
    gates = torch.rand(tokens, top_k, device=CUDA)
    order, starts = route.sort_by_expert(ids, total)
    used = len(ids.unique())
    plain = normal(tokens, d)
    w_in, w_out = normal(2 * inner, d), normal(d, inner)
    rows = [plain[(ids == e).any(1)] for e in range(total)]

    def peer() -> None:
        for part in rows:
            g, u = F.linear(part, w_in).chunk(2, -1)
            F.linear(F.silu(g) * u, w_out)

    flops = 6.0 * tokens * top_k * d * inner
    size = (gate_up.nbytes + down.nbytes) * used / total
    return Work(
        lambda choice=None: gemm.experts_mlp(
            x, scale, gate_up, down, order, starts, top_k, gates, BF16, choice
        ),
        ("fp8" if name == "fp8" else "bf16") if tokens * top_k >= 512 * total else "copy", size, flops, peer,
        "torch bf16, a loop over experts",
    )  # fmt: skip


def _repeated(m: Matrix, count: int) -> Matrix:
    """Copies of the same expert, each in its own memory."""
    scale = None if m.scale is None else m.scale.expand(count, *m.scale.shape[1:]).contiguous()
    data = m.data.expand(count, -1, -1).contiguous()
    return Matrix(m.format, data, scale, None, m.n, m.k, m.group)


def sparse_product(kind: str, tokens: int, n: int, k: int) -> Work:
    """Weights with a zero pattern; torch multiplies the dense matrix."""
    w = normal(n, k)
    if kind == "2:4":
        groups = w.view(n, k // 4, 4)
        groups.scatter_(-1, groups.abs().topk(2, dim=-1, largest=False).indices, 0.0)
    else:
        kept = torch.rand(n // 16, k // 16, device=CUDA) < 0.1
        w *= kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
    found = sparse.find(Weight("dense", w), BF16, CUDA)
    assert found is not None
    size = (
        found.values.nbytes + found.places.nbytes
        if isinstance(found, sparse.TwoOfFour)
        else found.blocks.nbytes + found.columns.nbytes
    )
    x, out = normal(tokens, k), torch.empty(tokens, n, dtype=BF16, device=CUDA)
    return Work(
        lambda: sparse.multiply(x, found, out), "copy", size, 0.0, lambda: F.linear(x, w), "torch, dense"
    )


# -- rows


def softmax(rows: int, columns: int) -> Work:
    """Compared with unfused torch: maximum, difference, exponential, sum, quotient."""
    x = normal(rows, columns, dtype=torch.float32)

    def peer() -> Tensor:
        e = (x - x.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)

    return Work(lambda: sample.softmax(x), "copy", 8.0 * rows * columns, 0.0, peer, "torch, unfused")


def softmax_fused(rows: int, columns: int) -> Work:
    """Compared with torch.softmax."""
    x = normal(rows, columns, dtype=torch.float32)
    return Work(
        lambda: sample.softmax(x), "copy", 8.0 * rows * columns, 0.0, lambda: x.softmax(-1),
        "torch.softmax",
    )  # fmt: skip


def norm_quantize(tokens: int, d: int) -> Work:
    """RMSNorm and FP8 in one pass."""
    x, w = normal(tokens, d), torch.rand(d, device=CUDA)

    def peer() -> tuple[Tensor, Tensor]:
        n = F.rms_norm(x.float(), (d,), w).unflatten(1, (-1, 128))
        s = n.abs().amax(-1).clamp_min(1e-4) / 448
        return (n / s[..., None]).to(FP8), s

    return Work(
        lambda: sample.quantize(x, Norm(w, 1e-6)), "copy", 3.0 * tokens * d, 0.0, peer, "torch, unfused"
    )


def routing(tokens: int) -> Work:
    """V3's rule over 256 experts, and the sort by expert."""
    spec = RouterSpec(256, 8, 8, 4, scale=2.5)
    logits, bias = normal(tokens, 256, dtype=torch.float32), torch.rand(256, device=CUDA)

    def run() -> object:
        ids, _ = route.route(logits, bias, spec)
        return route.sort_by_expert(ids, 256)

    def peer() -> object:
        ids, _ = reference_route(logits, bias, spec)
        return ids.flatten().sort(stable=True)

    return Work(run, "copy", tokens * (256 * 4 + 8 * 16), 0.0, peer, "torch")


def sampling(rows: int, vocabulary: int) -> Work:
    """One token per row from the whole vocabulary."""
    logits = normal(rows, vocabulary, dtype=torch.float32)
    u = torch.rand(rows, dtype=torch.float64, device=CUDA)
    return Work(
        lambda: sample.sample_tokens(logits, u), "copy", 4.0 * rows * vocabulary, 0.0,
        lambda: logits.softmax(-1).multinomial(1), "torch softmax + multinomial",
    )  # fmt: skip
