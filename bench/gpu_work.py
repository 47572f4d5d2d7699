"""The workloads of bench/gpu.py: one function per row, each with torch's own implementation.

Shapes are DeepSeek-V3's unless the row says otherwise. Nothing here runs without a GPU.
Legend: D hidden, I intermediate, E experts, H heads, c latent, r rotary, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.ops.api import Batch, Norm, Place
from farthing.ops.reference import route as reference_route
from farthing.ops.specs import RouterSpec
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight, quantize_int4, quantize_int8
from farthing_gpu import GpuOps, gemm, route, sample, sparse
from farthing_gpu import attention as kernels
from farthing_gpu import gemm as grouped
from farthing_gpu import sample as fused_softmax
from farthing_gpu import sample as normalize
from farthing_gpu.matrix import Matrix, pack

CUDA = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
Ceiling = Literal["copy", "bf16", "fp8"]


@dataclass(frozen=True, slots=True)
class Work:
    """One workload. bytes: minimum traffic; flops: required operations.

    `run` takes a configuration if its kernel has a choice (`gpu_tune`), else nothing.
    """

    run: Callable[..., object]
    ceiling: Ceiling
    bytes: float = 0.0
    flops: float = 0.0
    peer: Callable[[], object] | None = None
    peer_name: str = ""


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=CUDA)


def _normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=torch.float32).to(dtype)


def fp8_matrix(n: int, k: int, count: int = 1) -> Matrix:
    """Random FP8 weights with random scales."""
    data = torch.empty(count, n, k, dtype=FP8, device=CUDA)
    for part in data:
        part.copy_(_normal(n, k))
    scale = torch.rand(count, math.ceil(n / 128), math.ceil(k / 128), device=CUDA) / k**0.5
    return Matrix("fp8", data, scale, None, n, k)


# -- products


def dense_fp8(m: int, n: int, k: int) -> Work:
    """Block-scaled FP8; torch's path is its own 1 x 128 by 128 x 128 scaling."""
    w = fp8_matrix(n, k)
    x, scale = normalize.quantize(_normal(m, k))
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
    w, x, dense = packed(name, n, k), _normal(tokens, k), _normal(n, k)
    out = torch.empty(tokens, n, dtype=BF16, device=CUDA)
    return Work(
        lambda choice=None: gemm.gemm(x, w, out, choice=choice), "bf16" if tokens >= 512 else "copy",
        w.nbytes, 2.0 * tokens * n * k, lambda: F.linear(x, dense), "torch bf16 linear",
    )  # fmt: skip


def experts(name: str, tokens: int, total: int, top_k: int, d: int, inner: int) -> Work:
    """Gate, up and down of every slot, with evenly selected experts; torch loops over experts in bfloat16."""
    if name == "fp8":
        gate_up, down = fp8_matrix(2 * inner, d, total), fp8_matrix(d, inner, total)
        x, scale = normalize.quantize(_normal(tokens, d))
    else:
        gate_up, down = (_repeated(packed(name, n, k), total) for n, k in ((2 * inner, d), (d, inner)))
        x, scale = _normal(tokens, d), None
    ids = torch.stack([torch.randperm(total, device=CUDA)[:top_k] for _ in range(tokens)])
    gates = torch.rand(tokens, top_k, device=CUDA)
    order, starts = route.sort_by_expert(ids, total)
    used = len(ids.unique())
    plain = _normal(tokens, d)
    w_in, w_out = _normal(2 * inner, d), _normal(d, inner)
    rows = [plain[(ids == e).any(1)] for e in range(total)]

    def peer() -> None:
        for part in rows:
            g, u = F.linear(part, w_in).chunk(2, -1)
            F.linear(F.silu(g) * u, w_out)

    flops = 6.0 * tokens * top_k * d * inner
    size = (gate_up.nbytes + down.nbytes) * used / total
    return Work(
        lambda choice=None: grouped.experts_mlp(
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
    w = _normal(n, k)
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
    x, out = _normal(tokens, k), torch.empty(tokens, n, dtype=BF16, device=CUDA)
    return Work(
        lambda: sparse.multiply(x, found, out), "copy", size, 0.0, lambda: F.linear(x, w), "torch, dense"
    )


# -- attention


def mla_decode(batch: int, context: int, heads: int, cache_dtype: Any) -> Work:
    """One token per sequence over its paged cache; torch attends to contiguous latents."""
    ops, size = GpuOps(BF16, CUDA), 64
    blocks = context // size
    cache = ops.new_cache(1, batch * blocks, size, 576, cache_dtype)
    cache.data.copy_(_normal(*cache.data.shape))
    table = torch.randperm(batch * blocks, device=CUDA).view(batch, blocks).int()
    q, pe = _normal(batch, heads, 512), _normal(batch, heads, 64)
    at, order = _ints([context - 1] * batch), _ints(range(batch))
    key = _normal(batch, 1, context, 576)
    query = torch.cat((q, pe), -1).unsqueeze(2)  # [B, H, 1, 576]
    moved = cache.data[0].nbytes + (0 if cache.scale is None else cache.scale.nbytes)

    def peer() -> Tensor:
        keys = key.expand(-1, heads, -1, -1)
        return F.scaled_dot_product_attention(query, keys, keys[..., :512], scale=0.07)

    return Work(
        lambda choice=None: kernels.decode(q, pe, cache, 0, table, order, at, 0.07, choice=choice), "copy",
        moved, 2.0 * batch * context * heads * (576 + 512), peer, "torch SDPA on latents",
    )  # fmt: skip


def mla_prefill(batch: int, length: int, heads: int) -> Work:
    """Causal attention of whole prompts; torch gets keys with the rotary part repeated per head."""
    t = batch * length
    q, pe = _normal(t, heads * 192), _normal(t, heads, 64)
    kv, key = _normal(t, heads * 256), _normal(t, 64)
    out = torch.empty(t, heads * 128, dtype=BF16, device=CUDA)
    spans = [(b * length, (b + 1) * length) for b in range(batch)]
    first = _ints([s for s, _ in spans])
    wide = [_normal(batch, heads, length, d) for d in (192, 192, 128)]
    return Work(
        lambda choice=None: kernels.prefill(
            q, pe, kv, key, out, spans, first, [length] * batch, 0.07, (heads, 128, 64, 128), choice
        ),
        "bf16", 0.0, 1.0 * batch * length * length * heads * (192 + 128),
        lambda: F.scaled_dot_product_attention(*wide, is_causal=True), "torch SDPA",
    )  # fmt: skip


def rotary(tokens: int, heads: int) -> Work:
    """Rotation of the queries' rotary parts; torch computes it from views, unfused."""
    q, rope = _normal(tokens, heads * 192), torch.rand(2, tokens, 32, device=CUDA)
    positions = _ints(range(tokens))

    def peer() -> Tensor:
        x = q.view(tokens, heads, 192)[..., 128:].float()
        cos, sin = (t[positions.long()][:, None] for t in rope)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(BF16)

    return Work(
        lambda: kernels.rotate_queries(q, positions, rope, heads, 128, 64, True), "copy",
        2.0 * tokens * heads * 64 * 2, 0.0, peer, "torch",
    )  # fmt: skip


# -- rows


def softmax(rows: int, columns: int) -> Work:
    """Compared with unfused torch: maximum, difference, exponential, sum, quotient."""
    x = _normal(rows, columns, dtype=torch.float32)

    def peer() -> Tensor:
        e = (x - x.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)

    return Work(lambda: fused_softmax.softmax(x), "copy", 8.0 * rows * columns, 0.0, peer, "torch, unfused")


def softmax_fused(rows: int, columns: int) -> Work:
    """Compared with torch.softmax."""
    x = _normal(rows, columns, dtype=torch.float32)
    return Work(
        lambda: fused_softmax.softmax(x), "copy", 8.0 * rows * columns, 0.0, lambda: x.softmax(-1),
        "torch.softmax",
    )  # fmt: skip


def norm_quantize(tokens: int, d: int) -> Work:
    """RMSNorm and FP8 in one pass."""
    x, w = _normal(tokens, d), torch.rand(d, device=CUDA)

    def peer() -> tuple[Tensor, Tensor]:
        n = F.rms_norm(x.float(), (d,), w).unflatten(1, (-1, 128))
        s = n.abs().amax(-1).clamp_min(1e-4) / 448
        return (n / s[..., None]).to(FP8), s

    return Work(
        lambda: normalize.quantize(x, Norm(w, 1e-6)), "copy", 3.0 * tokens * d, 0.0, peer, "torch, unfused"
    )


def routing(tokens: int) -> Work:
    """V3's rule over 256 experts, and the sort by expert."""
    spec = RouterSpec(256, 8, 8, 4, scale=2.5)
    logits, bias = _normal(tokens, 256, dtype=torch.float32), torch.rand(256, device=CUDA)

    def run() -> object:
        ids, _ = route.route(logits, bias, spec)
        return route.sort_by_expert(ids, 256)

    def peer() -> object:
        ids, _ = reference_route(logits, bias, spec)
        return ids.flatten().sort(stable=True)

    return Work(run, "copy", tokens * (256 * 4 + 8 * 16), 0.0, peer, "torch")


def sampling(rows: int, vocabulary: int) -> Work:
    """One token per row from the whole vocabulary."""
    logits = _normal(rows, vocabulary, dtype=torch.float32)
    u = torch.rand(rows, dtype=torch.float64, device=CUDA)
    return Work(
        lambda: sample.sample_tokens(logits, u), "copy", 4.0 * rows * vocabulary, 0.0,
        lambda: logits.softmax(-1).multinomial(1), "torch softmax + multinomial",
    )  # fmt: skip


# -- a whole step

V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "first_k_dense_replace": 1,
    "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    "max_position_embeddings": 4096, "num_nextn_predict_layers": 0,
}  # fmt: skip


class RandomSource:
    """bfloat16 weights generated on the device on demand."""

    def has(self, name: str) -> bool:
        """Always false: there are no optional tensors."""
        return False

    def holds(self, module: str) -> bool:
        """Always true: every expert is local."""
        return True

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Normal random values with about unit gain."""
        assert shape is not None
        if "norm" in name:
            return torch.ones(shape, device=CUDA)
        return _normal(*shape) / shape[-1] ** 0.5

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """A dense matrix."""
        return Weight("dense", self.tensor(module, shape))


def decode_step(batch: int, context: int) -> Work:
    """All layers and the head; bytes count the selected experts and everything else."""
    config = ModelConfig.from_json(V2_LITE)
    ops = GpuOps(BF16, CUDA)
    before = torch.cuda.memory_allocated()
    model = DecoderModel(config, ops, RandomSource())
    weights = torch.cuda.memory_allocated() - before
    blocks = context // 64
    cache = model.new_cache(batch * blocks, 64, "bfloat16")
    tables = [list(range(b * blocks, (b + 1) * blocks)) for b in range(batch)]
    host = make_batch([1] * batch, [context - 1] * batch, tables, 64)
    tensors = {
        name: value.to(CUDA) for name in Batch.__slots__ if isinstance(value := getattr(host, name), Tensor)
    }
    step = Batch(**tensors)
    ids = torch.randint(0, config.vocab_size, (batch,), device=CUDA)
    counts = torch.zeros(len(model.layers), config.n_routed_experts or 0, dtype=torch.int64, device=CUDA)
    model.forward(ids, step, cache, counts)
    one = 3 * config.hidden_size * config.moe_intermediate_size * 2
    unused = int((counts[1:] == 0).sum())
    embedding = config.vocab_size * config.hidden_size * 2  # looked up, not read
    moved = weights - embedding - unused * one + cache.data.nbytes

    def run() -> object:
        return model.top_logits(model.forward(ids, step, cache), 1)

    def plain() -> object:
        h = ops.embed(ids, model.embedding)
        for i, (attention, feed_forward) in enumerate(model.layers):
            h, _ = attention(h, Place(cache, i, step))
            h = feed_forward(h)
        return model.top_logits(h, 1)

    return Work(run, "copy", moved, 0.0, plain, "the same kernels without a graph")
