"""Parts and batches of random models, and the error measure for quantized kernels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from farthing.ops.api import Batch
from farthing.ops.specs import AttentionSpec, MoEWeights, RouterSpec
from farthing.ops.weights import INTEGERS, Weight, folded, quantize_int4, quantize_int8


def distance(x: Tensor, y: Tensor) -> float:
    """1 - 2 x·y / (x·x + y·y) in float64: 0 if equal, about half the squared relative error."""
    x, y = x.double(), y.double()
    total = (x * x).sum() + (y * y).sum()
    return float(1 - 2 * (x * y).sum() / total) if total > 0 else 0.0


# Error bound per storage format, from int8 activations and float sums in another order.
BOUNDS = {"f32": 1e-10, "bf16": 1e-9, "fp8": 1e-9, "int8": 1e-4, "int4": 1e-4, "int4_zero": 1e-4}
GROUPS = [
    "mxfp4",
    "iq4_nl",
    "int8_groups",
    "q4_1",
    "q5_0",
    "q5_1",
]  # formats with scales of 16 bits for groups
UNITS = ["iq4_xs", "q4_k", "q5_k", "q6_k"]  # whose scales are multiples of units
BOUNDS |= dict.fromkeys((*GROUPS, *UNITS), 1e-4)
FORMATS = [name for name in BOUNDS if name not in UNITS and not name.startswith("q5")]
# Other scales of formats above.
SCALED = {"fp8_rows": 1e-9, "fp8_32": 1e-9, "int8_zero": 1e-4, "nvfp4": 1e-4}
BOUNDS |= SCALED
EPS = 1e-6

ROUTERS = {
    "v3": RouterSpec(8, 3, num_groups=4, top_k_groups=2, scale=2.5),
    "v2": RouterSpec(
        8, 2, num_groups=2, top_k_groups=1, scoring="softmax", group_score="max", normalize=False
    ),
    "plain": RouterSpec(8, 8),
    "adaptive": RouterSpec(8, 4, mass=0.6, min_experts=1),
}
SPECS = {
    "small": AttentionSpec(4, 16, 8, 16, 32, 0.2),
    "halves": AttentionSpec(3, 24, 8, 40, 48, 0.2, interleaved=False),
    "v3": AttentionSpec(4, 128, 64, 128, 512, 192**-0.5),
    "many_heads": AttentionSpec(20, 16, 16, 16, 32, 0.2),
}


def weight(name: str, n: int, k: int, group: int = 32) -> Weight:
    """A random matrix [n, k] of about unit gain in a storage format."""
    w = torch.randn(n, k) / k**0.5
    if name == "f32":
        return Weight("dense", w)
    if name == "bf16":
        return Weight("dense", w.bfloat16())
    if name == "int8":
        return quantize_int8(w)
    if name == "fp8":
        scale = torch.rand((n + 127) // 128, (k + 127) // 128) + 0.5
        return Weight("fp8", (w * 16).to(torch.float8_e4m3fn), scale / 16)
    if name in SCALED:
        return scaled(name, n, k)
    if name in (*GROUPS, *UNITS):
        return in_groups(name, n, k, 16 if name == "q6_k" else group)
    w4 = quantize_int4(w, group)
    if name == "int4":
        return w4
    assert w4.scale is not None
    return Weight("int4", w4.data, w4.scale, torch.randint(-4, 5, w4.scale.shape, dtype=torch.int8))


def scaled(name: str, n: int, k: int) -> Weight:
    """FP8 with a scale per row or 32 columns, 8 bits with zero points, and FP4 with scales of FP8."""
    if name == "int8_zero":
        w = in_groups("int8_groups", n, k, 32)
        assert w.scale is not None
        return replace(w, zero_point=torch.randint(-128, 128, w.scale.shape, dtype=torch.int8))
    if name == "nvfp4":
        w = in_groups("mxfp4", n, k, 16)
        assert w.scale is not None
        e4m3 = (torch.rand(w.scale.shape) * 448).to(torch.float8_e4m3fn).float()
        return replace(w, scale=e4m3 * (torch.rand(1) / 448 / k**0.5))
    data = (torch.randn(n, k) * 16 / k**0.5).to(torch.float8_e4m3fn)
    scale = torch.rand(n, 1).expand(-1, -(-k // 128)) if name == "fp8_rows" else torch.rand(n, k // 32)
    return Weight("fp8", data, (scale + 0.5) / 16)


def in_groups(name: str, n: int, k: int, group: int) -> Weight:
    """Random integers of a format with scales for groups, every one of them in the first row."""
    stored, shape = INTEGERS[name], (n, k // group)
    low, high = (
        (-(1 << stored.bits - 1), 1 << stored.bits - 1)
        if name in ("int8_groups", "q5_0", "q6_k")
        else (0, 1 << stored.bits)
    )
    u = torch.randint(low, high, (n, k), dtype=torch.int16)
    every = torch.arange(low, high)
    u[0, : len(every)] = every[:k].to(u.dtype)
    top = max(abs(q) for q in stored.codes or (low, high))
    if name == "mxfp4":
        scale = torch.exp2(torch.randint(-3, 4, shape).float()) / top / k**0.5
        scale = torch.exp2(scale.log2().round())
    elif stored.unit:
        unit, multiple = torch.randn(n, k // stored.unit).half().float() / 2**12, torch.randint(0, 64, shape)
        each = stored.unit // group
        scale = unit.repeat_interleave(each, 1) * multiple
    else:
        scale = (torch.randn(shape) / top / k**0.5).half().float()
    minimum = units = None
    if stored.minimums:
        minimum = (scale * -(high / 2)).half().float()
    if stored.unit:
        units = (unit, None)
        if minimum is not None:
            least = torch.randn(n, k // stored.unit).half().float() / 2**9
            minimum, units = -least.repeat_interleave(each, 1) * torch.randint(0, 64, shape), (unit, -least)
    data = (
        u.to(torch.uint8)[:, 0::2] | u.to(torch.uint8)[:, 1::2] << 4 if stored.bits == 4 else u.to(torch.int8)
    )
    return Weight(name, data, scale, minimum=minimum, units=units)  # type: ignore[arg-type]


def norm(k: int) -> Tensor:
    return torch.rand(k) + 0.5


def zero_blocks(w: Weight, share: float) -> Weight:
    """The same weight with a share of its 16 x 16 blocks zero."""
    n, k = w.shape
    keep = (torch.rand(n // 16, k // 16) >= share).repeat_interleave(16, 0).repeat_interleave(16, 1)
    if w.format == "int8":
        return Weight("int8", w.data * keep, w.scale)
    keep2 = keep[:, ::2]
    return Weight("int4", torch.where(keep2, w.data, torch.full_like(w.data, 0x88)), w.scale)


def experts(spec: RouterSpec, name: str, hidden: int, width: int, shared: int | None) -> MoEWeights:
    def mlp(inner: int) -> tuple[Weight, Weight, Weight]:
        return weight(name, inner, hidden), weight(name, inner, hidden), weight(name, hidden, inner)

    parts = [mlp(width) for _ in range(spec.num_experts)]
    common = None if shared is None else mlp(shared)
    gate = torch.randn(spec.num_experts, hidden) / hidden**0.5
    bias = torch.randn(spec.num_experts) * 0.1 if spec.scoring == "sigmoid" else None
    return MoEWeights(gate, bias, [lambda p=p: p for p in parts], None if common is None else lambda: common)


def ordered_experts(spec: RouterSpec, name: str, hidden: int, width: int) -> MoEWeights:
    """Gate and up of an expert share an order; those of experts, and of their down projections, differ."""
    w = experts(spec, name, hidden, width, width)

    def of(load: object) -> object:
        gate, up, down = load()  # type: ignore[operator]
        order = torch.randperm(hidden)
        mlp = folded(
            replace(gate, order=order), replace(up, order=order), replace(down, order=torch.randperm(width))
        )
        return lambda: mlp

    loads = [of(load) for load in w.experts]
    return replace(w, experts=loads, shared=of(w.shared))  # type: ignore[arg-type]


def batch_of(lengths: list[tuple[int, int]], block_size: int, max_len: int) -> Batch:
    """Sequences of (cached tokens, tokens of this step), with blocks in scattered order."""
    blocks_each = (max_len + block_size - 1) // block_size
    table = torch.randperm(len(lengths) * blocks_each).view(len(lengths), -1).int()
    positions, slots, starts = [], [], [0]
    for b, (cached, new) in enumerate(lengths):
        for p in range(cached, cached + new):
            positions.append(p)
            slots.append(int(table[b, p // block_size]) * block_size + p % block_size)
        starts.append(starts[-1] + new)
    context = [cached + new for cached, new in lengths]
    return Batch(
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int64),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(context, dtype=torch.int32),
        table.contiguous(),
    )
