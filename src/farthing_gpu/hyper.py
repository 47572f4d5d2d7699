"""DeepSeek-V4's ops on a GPU, and its hyper-connections: coefficients and sums take one pass per half of a
layer, after torch's product. Attention is in `compressed.py`.

Legend: T tokens; n streams of D columns; f [T, n (n + 2)] the product of normed streams with the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops import compressed as past
from farthing.ops.api import Ops, Place
from farthing.ops.specs import CompressedParts, CompressedSpec, StreamParts, StreamSpec
from farthing_gpu.compressed import attend
from farthing_gpu.launch import narrow, rows

_COLUMNS = 1024


@triton.jit
def _collapse(
    x_ptr, f_ptr, base_ptr, scale_ptr, u_ptr, mix_ptr, eps, D,
    n: tl.constexpr, N: tl.constexpr, steps: tl.constexpr, ends: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    used = i < n
    width = n if ends else n * (n + 2)
    f = f_ptr + t * width
    into = tl.sigmoid(tl.load(f + i, used, 0.0) * tl.load(scale_ptr) + tl.load(base_ptr + i, used, 0.0)) + eps
    if not ends:
        out = tl.load(f + n + i, used, 0.0) * tl.load(scale_ptr + 1) + tl.load(base_ptr + n + i, used, 0.0)
        tl.store(mix_ptr + t * n * (n + 1) + i, 2 * tl.sigmoid(out), used)
        cell = i[:, None] * n + i[None, :]
        inside = used[:, None] & used[None, :]
        m = tl.load(f + 2 * n + cell, inside, 0.0) * tl.load(scale_ptr + 2)
        m += tl.load(base_ptr + 2 * n + cell, inside, 0.0)
        m = tl.where(inside, m, -1e30)
        m = tl.where(inside, tl.exp(m - tl.max(m, 1)[:, None]), 0.0)
        m = tl.where(inside, m / tl.where(used, tl.sum(m, 1), 1.0)[:, None] + eps, 0.0)
        m = m / (tl.sum(m, 0) + eps)[None, :]
        for _ in range(steps - 1):
            m = m / (tl.sum(m, 1) + eps)[:, None]
            m = m / (tl.sum(m, 0) + eps)[None, :]
        tl.store(mix_ptr + t * n * (n + 1) + n + cell, m, inside)
    for first in range(0, D, columns):
        c = first + tl.arange(0, columns)
        at = used[:, None] & (c < D)[None, :]
        x = tl.load(x_ptr + t * n * D + i[:, None] * D + c[None, :], at, 0.0).to(tl.float32)
        u = tl.sum(tl.where(used, into, 0.0)[:, None] * x, 0)
        tl.store(u_ptr + t * D + c, narrow(u, u_ptr.dtype.element_ty), c < D)


@triton.jit
def _spread(x_ptr, y_ptr, mix_ptr, out_ptr, D, n: tl.constexpr, N: tl.constexpr, columns: tl.constexpr):
    t, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, N)
    used = i < n
    mix = mix_ptr + t * n * (n + 1)
    weights, own = tl.load(mix + n + i * n + j, used, 0.0), tl.load(mix + j)
    for first in range(0, D, columns):
        c = first + tl.arange(0, columns)
        at = used[:, None] & (c < D)[None, :]
        x = tl.load(x_ptr + t * n * D + i[:, None] * D + c[None, :], at, 0.0).to(tl.float32)
        y = tl.load(y_ptr + t * D + c, c < D, 0.0).to(tl.float32)
        out = own * y + tl.sum(weights[:, None] * x, 0)
        tl.store(out_ptr + (t * n + j) * D + c, narrow(out, out_ptr.dtype.element_ty), c < D)


def collapse(x: Tensor, h: past.Streams) -> tuple[Tensor, Tensor]:
    """`Ops.collapse` of contiguous x [T, n D]."""
    n, T, D = h.spec.count, len(x), x.shape[1] // h.spec.count
    x32 = x.float()
    f = F.linear(x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + h.spec.norm_eps), h.parts.weight)
    ends = f.shape[1] == n
    u, mix = x.new_empty(T, D), f.new_empty(T, 0 if ends else n * (n + 1))
    _collapse[(T,)](
        x, f, h.parts.base, h.parts.scale, u, mix, h.spec.eps, D,
        n=n, N=triton.next_power_of_2(n), steps=h.spec.steps, ends=ends,
        columns=min(_COLUMNS, triton.next_power_of_2(D)),
    )  # fmt: skip
    return u, mix


def spread(x: Tensor, y: Tensor, mix: Tensor, n: int) -> Tensor:
    """`Ops.spread` of contiguous x [T, n D] and y [T, D]."""
    D, out = y.shape[1], torch.empty_like(x)
    columns = min(_COLUMNS, triton.next_power_of_2(D))
    _spread[(len(x), n)](x, y, mix, out, D, n=n, N=triton.next_power_of_2(n), columns=columns)
    return out


class StreamedOps(Ops):
    """The ops of DeepSeek-V4, for `GpuOps`."""

    def pack_compressed(
        self, name: str, spec: CompressedSpec, parts: Callable[[], CompressedParts], rope: Tensor
    ) -> past.Compressed:
        return past.pack_heads(spec, parts(), rope, self._on_device)

    def pack_streams(
        self, name: str, spec: StreamSpec, hidden: int, parts: Callable[[], StreamParts]
    ) -> past.Streams:
        return past.pack_streams(spec, parts(), self._on_device)

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def compressed(
        self, q: Tensor, x: Tensor, index_q: Tensor | None, heads: past.Compressed, place: Place
    ) -> Tensor:
        return attend(rows(q), rows(x), None if index_q is None else rows(index_q), heads, place)

    def collapse(self, x: Tensor, streams: past.Streams) -> tuple[Tensor, Tensor]:
        return collapse(x.contiguous(), streams)

    def spread(self, x: Tensor, y: Tensor, mix: Tensor, streams: past.Streams) -> Tensor:
        return spread(x.contiguous(), y.contiguous(), mix, streams.spec.count)
