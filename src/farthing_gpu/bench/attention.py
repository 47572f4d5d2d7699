"""Attention and a whole step: one function per line of the table, each with torch's own implementation.

Shapes are DeepSeek-V3's, and V2-Lite's of a step. Legend: H heads, c latent, r rotary, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.ops.api import Batch, Place
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight
from farthing_gpu import GpuOps
from farthing_gpu import attention as kernels
from farthing_gpu.bench import products


def ints(values: Sequence[int]) -> Tensor:
    """Integers on the device."""
    return torch.tensor(values, dtype=torch.int32, device=products.CUDA)


def mla_decode(batch: int, context: int, heads: int, cache_dtype: Any) -> products.Work:
    """One token per sequence over its paged cache; torch attends to contiguous latents."""
    ops, size = GpuOps(products.BF16, products.CUDA), 64
    blocks = context // size
    cache = ops.new_cache(1, batch * blocks, size, 576, cache_dtype)
    cache.data.copy_(products.normal(*cache.data.shape))
    table = torch.randperm(batch * blocks, device=products.CUDA).view(batch, blocks).int()
    q, pe = products.normal(batch, heads, 512), products.normal(batch, heads, 64)
    at, order = ints([context - 1] * batch), ints(range(batch))
    key = products.normal(batch, 1, context, 576)
    query = torch.cat((q, pe), -1).unsqueeze(2)  # [B, H, 1, 576]
    moved = cache.data[0].nbytes + (0 if cache.scale is None else cache.scale.nbytes)

    def peer() -> Tensor:
        keys = key.expand(-1, heads, -1, -1)
        return F.scaled_dot_product_attention(query, keys, keys[..., :512], scale=0.07)

    return products.Work(
        lambda choice=None: kernels.decode(q, pe, cache, 0, table, order, at, 0.07, choice=choice), "copy",
        moved, 2.0 * batch * context * heads * (576 + 512), peer, "torch SDPA on latents",
    )  # fmt: skip


def mla_prefill(batch: int, length: int, heads: int) -> products.Work:
    """Causal attention of whole prompts; torch gets keys with the rotary part repeated per head."""
    t = batch * length
    q, pe = products.normal(t, heads * 192), products.normal(t, heads, 64)
    kv, key = products.normal(t, heads * 256), products.normal(t, 64)
    out = torch.empty(t, heads * 128, dtype=products.BF16, device=products.CUDA)
    spans = [(b * length, (b + 1) * length) for b in range(batch)]
    first = ints([s for s, _ in spans])
    wide = [products.normal(batch, heads, length, d) for d in (192, 192, 128)]
    return products.Work(
        lambda choice=None: kernels.prefill(
            q, pe, kv, key, out, spans, first, [length] * batch, 0.07, (heads, 128, 64, 128), choice
        ),
        "bf16", 0.0, 1.0 * batch * length * length * heads * (192 + 128),
        lambda: F.scaled_dot_product_attention(wide[0], wide[1], wide[2], is_causal=True), "torch SDPA",
    )  # fmt: skip


def rotary(tokens: int, heads: int) -> products.Work:
    """Rotation of the queries' rotary parts; torch computes it from views, unfused."""
    q, rope = products.normal(tokens, heads * 192), torch.rand(2, tokens, 32, device=products.CUDA)
    positions = ints(range(tokens))

    def peer() -> Tensor:
        x = q.view(tokens, heads, 192)[..., 128:].float()
        cos, sin = (t[positions.long()][:, None] for t in rope)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(products.BF16)

    return products.Work(
        lambda: kernels.rotate_queries(q, positions, rope, heads, 128, 64, True), "copy",
        2.0 * tokens * heads * 64 * 2, 0.0, peer, "torch",
    )  # fmt: skip


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
            return torch.ones(shape, device=products.CUDA)
        return products.normal(*shape) / float(shape[-1] ** 0.5)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """A dense matrix."""
        return Weight("dense", self.tensor(module, shape))


def decode_step(batch: int, context: int) -> products.Work:
    """All layers and the head; bytes count the selected experts and everything else."""
    config = ModelConfig.from_json(V2_LITE)
    ops = GpuOps(products.BF16, products.CUDA)
    before = torch.cuda.memory_allocated()
    model = DecoderModel(config, ops, RandomSource())
    weights = torch.cuda.memory_allocated() - before
    blocks = context // 64
    cache = model.new_cache(batch * blocks, 64, "bfloat16")
    tables = [list(range(b * blocks, (b + 1) * blocks)) for b in range(batch)]
    on = products.CUDA
    host = make_batch([1] * batch, [context - 1] * batch, tables, 64)
    parts = {name: getattr(host, name) for name in Batch.__slots__}
    moved_parts: dict[str, Any] = {name: x.to(on) for name, x in parts.items() if isinstance(x, Tensor)}
    step = Batch(**moved_parts)
    ids = torch.randint(0, config.vocab_size, (batch,), device=on)
    counts = torch.zeros(
        len(model.layers), config.n_routed_experts or 0, dtype=torch.int64, device=products.CUDA
    )
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

    return products.Work(run, "copy", moved, 0.0, plain, "the same kernels without a graph")
