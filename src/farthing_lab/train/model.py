"""DeepSeek-V3 for training: latent attention, auxiliary-loss-free routing, multi-token prediction.

`forward` follows the papers (DeepSeek-V2 sec. 2.1 for attention, DeepSeek-V3 sec. 2.1.2 for routing and
2.2 for multi-token prediction). Master weights are float32; matrix products run in `compute_dtype`.

Shapes: B sequences, T positions, N = B*T tokens, D hidden, H heads, E experts, K experts per token,
I expert width, V vocabulary, c key-value latent, r rotary part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.config import ConfigError, ModelConfig, RopeConfig, check_config
from farthing.model.forms import SIZES, Experts
from farthing.ops.specs import RouterSpec
from farthing_lab.train.functional import (
    Product,
    Routing,
    causal_attention,
    combine,
    fused_cross_entropy,
    rms_norm,
    routed_experts,
)

# The trainable architecture: DeepSeek-V3's, described by the engine's `ModelConfig`.

# Fields of `ModelConfig` that DeepSeek's config.json lacks or names differently.
_OTHER = {"mixers", "feeds", "embedding_scale", "head", "norm_offset", "post_norms", "eos_token_ids"}


def check_trainable(cfg: ModelConfig) -> None:
    """Raise ConfigError with the field whose value the training model does not implement."""
    if cfg.num_nextn_predict_layers > 1:
        raise ConfigError(
            f"num_nextn_predict_layers: got {cfg.num_nextn_predict_layers}; expected 0 or 1 for training"
        )
    needed = {"q_lora_rank": cfg.latent.q_lora_rank, "n_routed_experts": cfg.n_routed_experts}
    for name, value in needed.items():
        if not value:
            raise ConfigError(f"{name}: got {value!r}; expected a positive integer for training")
    alike = len({*cfg.mixers}) == 1 and not (cfg.index and cfg.index.interleaved)
    if not cfg.selecting(None).is_plain or not alike:
        raise ConfigError(
            f"model_type: got {cfg.model_type!r}; expected DeepSeek-V3's or V3.2's layers for training"
        )
    if cfg.rope != RopeConfig(theta=cfg.rope.theta):
        raise ConfigError("rope_scaling is set; expected plain interleaved RoPE for training")
    check_config(cfg)
    dense = cfg.dense_prefix
    for layer in range(dense, cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        experts = cfg.feed(layer).experts
        if experts is None:
            raise ConfigError(f"moe_layer_freq: layer {layer} has no experts; expected some from {dense} on")
        if not experts.corrected or experts.router.scoring != "sigmoid":
            raise ConfigError("topk_method, scoring_func: expected 'noaux_tc' and 'sigmoid' for training")


def to_json(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that describe a trainable architecture, for `ModelConfig.from_json`."""
    fields: dict[str, Any] = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in _OTHER}
    others = ("query_latent_scale", "latent_scale", "index", "rope", "query_scaling")
    fields |= {k: v for k, v in dataclasses.asdict(cfg.latent).items() if k not in others}
    if (index := cfg.index) is not None:
        sizes = index.heads, index.width, index.top_k
        fields |= dict(zip(("index_n_heads", "index_head_dim", "index_topk"), sizes, strict=True))
    fields |= {"tie_word_embeddings": cfg.head.tie_word_embeddings}
    fields |= {"rope_theta": cfg.rope.theta, "rope_scaling": None, "eos_token_id": cfg.eos_token_ids[0]}
    return fields | _feed_forwards(cfg)


def _feed_forwards(cfg: ModelConfig) -> dict[str, Any]:
    experts = cfg.experts
    assert experts is not None, "as `check_trainable` asks"
    rule, width = experts.router, experts.width
    fields: dict[str, Any] = {
        "intermediate_size": cfg.intermediate_size or 4 * cfg.hidden_size,  # of no layer
        "moe_intermediate_size": width,
        "n_routed_experts": experts.count,
        "n_shared_experts": experts.shared_count,
        "num_experts_per_tok": rule.top_k,
        "n_group": rule.num_groups,
        "topk_group": rule.top_k_groups,
        "topk_method": "noaux_tc",
        "scoring_func": rule.scoring,
        "norm_topk_prob": rule.normalize,
        "routed_scaling_factor": rule.scale,
        "first_k_dense_replace": cfg.dense_prefix,
        "moe_layer_freq": 1,
    }
    if experts.shared % width:
        fields["shared_intermediate_size"] = experts.shared
    return fields | ({"layer_sizes": layer_sizes(cfg)} if cfg.uneven else {})


def layer_sizes(cfg: ModelConfig) -> list[dict[str, int]]:
    """The sizes of every layer's feed-forward, MTP layer last, as config.json has them where they differ."""
    found: list[dict[str, int]] = []
    for feed in cfg.feeds[: cfg.num_hidden_layers + cfg.num_nextn_predict_layers]:
        if (e := feed.experts) is None:
            found.append({"intermediate_size": feed.width})
        else:
            sizes = e.count, e.width, e.shared
            found.append(dict(zip(SIZES[1:], sizes, strict=True)))
    return found


# Sparse attention for training (DeepSeek-V3.2-Exp section 2.1): scores, selection, and the indexer's loss
# against attention.
#
# Shapes: B sequences, T positions, H heads, J index heads, d index head size.

Pick = Callable[
    [Tensor, int], Tensor
]  # (causal scores [B, T, T], k) -> the keys of each query, bool [B, T, T]
NONE = float("-inf")


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """sum_j w_j ReLU(q_j . k) d^-1/2, minus infinity for keys after the query: q [B, T, J, d], k [B, T, d],
    w [B, T, J] -> [B, T, T] float32.
    """
    w = w.float() * q.shape[-1] ** -0.5
    scores = q.new_zeros(q.shape[0], q.shape[1], q.shape[1], dtype=torch.float32)
    for j in range(q.shape[2]):
        scores = scores + w[..., j, None] * (q[:, :, j] @ k.mT).relu().float()
    return scores.masked_fill(~causal(scores), NONE)


def causal(scores: Tensor) -> Tensor:
    """Bool [T, T]: the keys up to and including each query."""
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return ones.tril()


def largest(scores: Tensor, k: int) -> Tensor:
    """The k keys with the largest scores, or all of them if there are fewer."""
    k = min(k, scores.shape[-1])
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(
        -1, scores.topk(k, sorted=False).indices, True
    )
    return chosen & causal(scores)


def recent(scores: Tensor, k: int) -> Tensor:
    """The last k keys, ignoring scores: a control."""
    return (causal(scores) & ~causal(scores).tril(-k)).expand_as(scores)


def random_keys(scores: Tensor, k: int) -> Tensor:
    """k random keys, including the query's own: a control."""
    noise = torch.rand_like(scores).masked_fill(~causal(scores), NONE)
    return largest(noise.diagonal_scatter(torch.full(scores.shape[:-1], 2.0), dim1=-2, dim2=-1), k)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the selected keys: q, k [B, H, T, d], v [B, H, T, dv], keys [B, T, T] ->
    (out [B, H, T, dv], mean distribution of the heads [B, T, T] float32, without gradient).
    """
    scores = (q @ k.mT).mul(scale).masked_fill(~keys[:, None], NONE)
    probs = scores.softmax(-1)
    return probs @ v, probs.detach().mean(1, dtype=torch.float32)


def divergence(target: Tensor, scores: Tensor, keys: Tensor) -> Tensor:
    """Mean KL(target || softmax of the scores over the selected keys), in nats per query."""
    log_q = scores.masked_fill(~keys, NONE).log_softmax(-1).masked_fill(~keys, 0.0)
    own: Tensor = torch.special.xlogy(target, target)
    return (own - target * log_q).sum(-1).mean()


# Rotary embedding for training: plain RoPE, with pairs as complex numbers.
#
# Shapes: B sequences, T positions, r rotary part.


def rope_table(theta: float, r: int, length: int) -> Tensor:
    """exp(i angle) [length, r/2] complex64 of plain RoPE."""
    frequency = theta ** (-torch.arange(0, r, 2, dtype=torch.float32) / r)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE on interleaved pairs as complex numbers. x [B, T, heads, r]; turn [T, r/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE on pairs (x_i, x_{i + r/2}) of the first r elements of x [B, T, heads, d]; turn [T, r/2]."""
    half = turn.shape[1]
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], -1)
    cos, sin = turn.real[:, None], turn.imag[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest), -1).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T without bias; float32 master weight [out, in], product in `compute_dtype`.

    `product`, if set, replaces the multiplication (FP8, fake quantization).
    """

    def __init__(self, d_in: int, d_out: int, std: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) * (0.5 * d_in**-0.5 if std is None else std))
        self.compute_dtype = torch.float32
        self.product: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in `compute_dtype`."""
        x = x.to(self.compute_dtype)
        if self.product is None:
            return F.linear(x, self.weight.to(self.compute_dtype))
        rows = x.flatten(0, -2)
        return self.product(rows, self.weight[None], [len(rows)]).view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32, returned in `compute_dtype`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.compute_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in `compute_dtype`."""
        return rms_norm(x, self.weight, self.eps, self.compute_dtype)


class Indexer(nn.Module):
    """The lightning indexer. Its inputs are detached: it only learns from attention's distribution.

    J index heads of size d.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        index = cfg.index
        assert cfg.latent.q_lora_rank is not None and index is not None
        self.heads, self.top_k, d = index.heads, index.top_k, index.width
        self.wq_b = Linear(cfg.latent.q_lora_rank, self.heads * d)
        self.wk = Linear(cfg.hidden_size, d)
        self.k_norm = nn.LayerNorm(d, eps=1e-6)
        self.weights_proj = Linear(cfg.hidden_size, self.heads)
        self.dense = False  # attend to all keys, for the warm-up
        self.pick: Pick = largest
        self.divergence: Tensor | None = None  # from attention, for the last training forward

    def forward(self, x: Tensor, latent: Tensor, turn: Tensor) -> Tensor:
        """x [B, T, D] and the query latent [B, T, q], each normed -> causal scores [B, T, T] float32."""
        x, latent = x.detach(), latent.detach()
        q = rotate_halves(self.wq_b(latent).unflatten(-1, (self.heads, -1)), turn)
        k = rotate_halves(self.k_norm(self.wk(x).float())[:, :, None], turn)[:, :, 0]
        return index_scores(q, k.to(q.dtype), self.weights_proj(x) * self.heads**-0.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, scores: Tensor) -> Tensor:
        """Attention over the selected keys; in training also records the divergence of the scores."""
        keys = causal(scores).expand_as(scores) if self.dense else self.pick(scores.detach(), self.top_k)
        out, target = attend(q, k, v, scale, keys)
        self.divergence = divergence(target, scores, keys) if self.training else None
        return out


class Attention(nn.Module):
    """Multi-head latent attention in expanded form (DeepSeek-V2 eq. 9-19), causal over each sequence."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        a, D, H = cfg.latent, cfg.hidden_size, cfg.num_attention_heads
        assert a.q_lora_rank is not None
        self.q_a_proj = Linear(D, a.q_lora_rank)
        self.q_a_layernorm = RMSNorm(a.q_lora_rank, cfg.rms_norm_eps)
        self.q_b_proj = Linear(a.q_lora_rank, H * a.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(D, a.kv_lora_rank + a.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(a.kv_lora_rank, cfg.rms_norm_eps)
        self.kv_b_proj = Linear(a.kv_lora_rank, H * (a.qk_nope_head_dim + a.v_head_dim))
        self.o_proj = Linear(H * a.v_head_dim, D, std=0.0)
        self.indexer = None if cfg.index is None else Indexer(cfg)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        a, H = self.cfg.latent, self.cfg.num_attention_heads
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (H, a.qk_head_dim))
        q_nope, q_pe = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], -1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([a.kv_lora_rank, a.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (H, -1))
        k_nope, v = kv.split([a.qk_nope_head_dim, a.v_head_dim], -1)
        k_pe = rotate(k_pe[:, :, None], turn).expand(-1, -1, H, -1)
        q = torch.cat((q_nope, rotate(q_pe, turn)), -1).transpose(1, 2)  # [B, H, T, nope + r]
        k = torch.cat((k_nope, k_pe), -1).transpose(1, 2)
        v, scale = v.transpose(1, 2), a.qk_head_dim**-0.5
        if self.indexer is None:
            out = causal_attention(q, k, v, scale)
        else:
            out = self.indexer.attend(q, k, v, scale, self.indexer(x, q_latent, turn))
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return projected


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim, std=0.0)
        self.tap: Callable[[Tensor], None] | None = None  # called with the neurons, [..., I]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if self.tap is not None:
            self.tap(hidden)
        out: Tensor = self.down_proj(hidden)
        return out


class Router(nn.Module):
    """noaux_tc: sigmoid scores, a bias that only affects selection, top-k within the best groups."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, dim: int, rule: RouterSpec) -> None:
        super().__init__()
        self.rule, count = rule, rule.num_experts
        self.weight = nn.Parameter(torch.randn(count, dim) * dim**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(count))
        self.register_buffer("load", torch.zeros(count), persistent=False)

    def scores(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, E] float32."""
        return torch.sigmoid(F.linear(x.float(), self.weight.float()))

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [N, D] -> weights [N, K] float32 (differentiable) and expert ids [N, K], chosen unless given."""
        scores = self.scores(x)
        ids = self.choose(scores.detach()) if ids is None else ids
        weights = scores.gather(1, ids)
        if self.rule.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self.load += torch.bincount(ids.flatten(), minlength=len(self.load))
        return weights * self.rule.scale, ids

    def choose(self, scores: Tensor) -> Tensor:
        """Group-limited top-k of the biased scores [N, E] -> ids [N, K]."""
        rule = self.rule
        choice = scores + self.e_score_correction_bias
        groups = choice.unflatten(-1, (rule.num_groups, -1))  # [N, G, E/G]
        group_score = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        keep = group_score.topk(rule.top_k_groups, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, keep, False)
        choice = groups.masked_fill(dropped[..., None], float("-inf")).flatten(1)
        ids: Tensor = choice.topk(rule.top_k, dim=-1, sorted=False).indices
        return ids

    @torch.no_grad()
    def rebalance(self, speed: float) -> Tensor:
        """One V3 bias update from the load since the last update. Returns that load [E]."""
        load = self.load.clone()
        self.e_score_correction_bias += speed * torch.sign(load.mean() - load)
        self.load.zero_()
        return load


class MoE(nn.Module):
    """Routed experts plus an always-on shared expert. `gate_up` is [E, 2, I, D], `down` [E, D, I].

    `products` (of gate and up, of down), if set, replace the fused op, and `tap` is called with the values
    between them.
    """

    def __init__(self, dim: int, experts: Experts) -> None:
        super().__init__()
        E, I = experts.count, experts.width  # noqa: E741
        self.gate = Router(dim, experts.router)
        self.gate_up = nn.Parameter(torch.randn(E, 2, I, dim) * (0.5 * dim**-0.5))
        self.down = nn.Parameter(torch.zeros(E, dim, I))
        self.shared_experts = MLP(dim, experts.shared)
        self.compute_dtype = torch.float32
        self.products: tuple[Product, Product] | None = None
        self.tap: Callable[[Tensor, Routing, Tensor], None] | None = None  # neurons, routing, weights

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; ids [B T, K]: the experts, chosen here unless given."""
        flat, dtype = x.flatten(0, 1), self.compute_dtype
        weights, ids = self.gate(flat, ids)
        gate_up = self.gate_up.flatten(1, 2)  # [E, 2I, D]
        if self.products is None:
            routed = routed_experts(flat.to(dtype), weights, ids, gate_up.to(dtype), self.down.to(dtype))
        else:
            routed = self._open(flat.to(dtype), weights, ids, gate_up)
        out: Tensor = routed.view_as(x) + self.shared_experts(x)
        return out

    def _open(self, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor) -> Tensor:
        """The routed experts op by op, R padded rows: x [N, D] -> [N, D]."""
        assert self.products is not None
        first, second = self.products
        routing = Routing.of(ids, len(self.down))
        gate, up = first(x, gate_up, routing.sizes, routing).chunk(2, -1)  # [R, I]
        hidden = F.silu(gate) * up
        if self.tap is not None:
            self.tap(hidden, routing, weights)
        return combine(second(hidden, self.down, routing.sizes), weights, routing)


class Block(nn.Module):
    """Pre-norm attention and feed-forward on a float32 residual stream."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        feed, D = cfg.feed(layer), cfg.hidden_size
        self.mlp = MLP(D, feed.width) if feed.experts is None else MoE(D, feed.experts)

    def forward(self, h: Tensor, turn: Tensor) -> Tensor:
        """h [B, T, D] float32 -> [B, T, D] float32."""
        h = h + self.self_attn(self.input_layernorm(h), turn)
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


class MTP(nn.Module):
    """Token i+2 from the trunk's output at i and the embedding of token i+1 (DeepSeek-V3 eq. 21-23)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        D = cfg.hidden_size
        self.enorm = RMSNorm(D, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(D, cfg.rms_norm_eps)
        self.eh_proj = Linear(2 * D, D)
        self.block = Block(cfg, cfg.num_hidden_layers)
        self.norm = RMSNorm(D, cfg.rms_norm_eps)

    def forward(self, h: Tensor, next_embedding: Tensor, turn: Tensor) -> Tensor:
        """h [B, T, D] after the trunk's final norm, next_embedding [B, T, D] -> normed hidden [B, T, D]."""
        x = self.eh_proj(torch.cat((self.enorm(next_embedding), self.hnorm(h)), -1))
        out: Tensor = self.norm(self.block(x.float(), turn))
        return out


class DeepSeekLM(nn.Module):
    """The complete language model. `forward` returns hidden states for `loss` and `logits`."""

    turn: Tensor

    def __init__(self, cfg: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.check(cfg)
        self.cfg = cfg
        self.embed_tokens = nn.Parameter(torch.randn(cfg.vocab_size, cfg.hidden_size) * 0.03)
        self.layers = nn.ModuleList(self.block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = None if cfg.head.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)
        self.mtp = MTP(cfg) if cfg.num_nextn_predict_layers else None
        self.register_buffer("turn", self.turns(cfg), persistent=False)
        self.set_compute_dtype(compute_dtype)

    def check(self, cfg: ModelConfig) -> None:
        """Raise ConfigError unless the architecture is this one."""
        check_trainable(cfg)

    def block(self, cfg: ModelConfig, layer: int) -> nn.Module:
        """A layer of the trunk."""
        return Block(cfg, layer)

    def turns(self, cfg: ModelConfig) -> Tensor:
        """The rotations of all positions, `rope_table`'s."""
        return rope_table(cfg.rope.theta, cfg.latent.qk_rope_head_dim, cfg.max_position_embeddings)

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """The dtype of every matrix product; norms, router and residual stream stay float32."""
        self.compute_dtype = dtype
        for module in self.modules():
            if isinstance(module, Linear | MoE | RMSNorm):
                module.compute_dtype = dtype

    def projections(self) -> Iterator[tuple[str, Linear | MoE]]:
        """(name, module) of every projection, without embedding, head and router."""
        for name, module in self.named_modules():
            if isinstance(module, Linear | MoE) and name != "lm_head":
                yield name, module

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output projection; the embedding if tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> hidden states after the final norm [B, T, D] in `compute_dtype`."""
        T = tokens.shape[1]
        if self.turn.shape[0] < T:
            raise ValueError(f"{T} positions exceed max_position_embeddings={self.turn.shape[0]}")
        return self.finish(F.embedding(tokens, self.embed_tokens))

    def finish(self, h: Tensor, first: int = 0) -> Tensor:
        """The rest of `forward` from h [B, T, D], the float32 input of layer `first`."""
        for layer in self.layers[first:]:
            h = layer(h, self.turn[: h.shape[1]])
        out: Tensor = self.norm(h)
        return out

    def draft(self, hidden: Tensor, next_tokens: Tensor) -> Tensor:
        """MTP hidden [B, T, D] for the token after `next_tokens` [B, T], given the trunk's `hidden`."""
        return self._draft(hidden, F.embedding(next_tokens, self.embed_tokens))

    def _draft(self, hidden: Tensor, next_embedding: Tensor) -> Tensor:
        if self.mtp is None:
            raise ValueError("num_nextn_predict_layers is 0; expected an MTP layer")
        out: Tensor = self.mtp(hidden, next_embedding, self.turn[: hidden.shape[1]])
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in `compute_dtype`."""
        return F.linear(hidden.to(self.compute_dtype), self.head_weight.to(self.compute_dtype))

    def loss(
        self, tokens: Tensor, mtp_weight: float = 0.0, mtp_share: float = 1.0, mtp_greedy: bool = False
    ) -> dict[str, Tensor]:
        """Losses of tokens [B, T + 1] in nats per token: {"loss": main + mtp_weight * mtp, "main", "mtp"}.

        The MTP loss uses the first `mtp_share` of the sequences, a fair sample of a shuffled batch, which is
        cheaper. Its targets are the text (DeepSeek-V3 eq. 24) or, with `mtp_greedy`, the trunk's own most
        likely tokens, which a draft must match to be accepted; then only the MTP layer learns from it.
        """
        head = self.head_weight.to(self.compute_dtype)
        hidden = self(tokens[:, :-1])
        main = fused_cross_entropy(hidden.flatten(0, 1), head, tokens[:, 1:].flatten())
        if self.mtp is None or mtp_weight <= 0:
            return {"loss": main, "main": main.detach()}
        rows = max(1, round(tokens.shape[0] * mtp_share))
        hidden, following, targets = hidden[:rows], tokens[:rows, 1:-1], tokens[:rows, 2:]
        embedding: Tensor = self.embed_tokens
        if mtp_greedy:
            hidden, head, embedding = hidden.detach(), head.detach(), embedding.detach()
            targets = F.linear(hidden[:, 1:], head).argmax(-1)
        guess = self._draft(hidden[:, :-1], F.embedding(following, embedding))
        mtp = fused_cross_entropy(guess.flatten(0, 1), head, targets.flatten())
        return {"loss": main + mtp_weight * mtp, "main": main.detach(), "mtp": mtp.detach()}

    def rebalance(self, speed: float) -> float:
        """Update every router's bias. Returns the largest load over the mean (1 = perfectly balanced)."""
        worst = 1.0
        for module in self.modules():
            if isinstance(module, Router):
                load = module.rebalance(speed)
                worst = max(worst, float(load.max() / load.mean().clamp_min(1)))
        return worst

    def describe(self) -> dict[str, Any]:
        """Parameter counts: total, active per token (trunk only, embedding counted once as the head)."""
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for layer in self.layers:
            if isinstance(layer.mlp, MoE):
                experts, _, width, dim = layer.mlp.gate_up.shape
                idle += (experts - self.cfg.num_experts_per_tok) * 3 * width * dim
        mtp = 0 if self.mtp is None else sum(p.numel() for p in self.mtp.parameters())
        return {"parameters": total, "mtp_parameters": mtp, "active_parameters": total - idle - mtp}
