"""DeepSeek-V4 for training: what it changes in `farthing_lab.train.model`.

A residual of several streams (section 2.2 of the paper), attention to a window and a compressed past (2.3),
experts that the first layers look up by the token (2.1). Attention computes blocks of 128 queries against two
blocks of keys and all entries; module names are transformers'.

Shapes: B sequences, T positions, n streams, D hidden, H heads of size d whose last r elements are rotated,
E entries, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.config import ConfigError, ModelConfig
from farthing.model.forms import CompressedHeads, Experts
from farthing.ops.indexer import top_positions
from farthing.ops.specs import StreamSpec
from farthing_lab.train.model import (
    NONE,
    DeepSeekLM,
    Linear,
    MoE,
    RMSNorm,
    Router,
    divergence,
    rope_table,
    rotate,
)

KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def form_of(cfg: ModelConfig, layer: int | None = None) -> CompressedHeads:
    """The sizes of a layer's attention; None: of one that selects entries."""
    form = cfg.attention if layer is None else cfg.mixer(layer)
    assert isinstance(form, CompressedHeads)
    return form


def _rates(cfg: ModelConfig) -> list[int]:
    return [form_of(cfg, layer).rate for layer in range(cfg.num_hidden_layers)]


def _hashed(cfg: ModelConfig) -> list[bool]:
    experts = (feed.experts for feed in cfg.feeds[: cfg.num_hidden_layers])
    return [e is not None and e.hashed for e in experts]


def to_json(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that describe a trainable architecture, for `ModelConfig.from_json`."""
    a, s, index, e = form_of(cfg), cfg.streams, cfg.index, cfg.experts
    assert s is not None and index is not None and e is not None
    own = [
        *("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "n_routed_experts"),
        *("num_experts_per_tok", "max_position_embeddings", "rms_norm_eps", "bos_token_id"),
    ]
    heads = ("num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank")
    return {
        "model_type": "deepseek_v4",
        **{name: getattr(cfg, name) for name in own},
        **{name: getattr(a, name) for name in heads},
        "tie_word_embeddings": cfg.head.tie_word_embeddings,
        "qk_rope_head_dim": a.rotary_width,
        "sliding_window": a.window,
        "index_n_heads": index.heads,
        "index_head_dim": index.width,
        "index_topk": index.top_k,
        "compress_ratios": _rates(cfg),
        "n_shared_experts": e.shared_count,
        "routed_scaling_factor": e.router.scale,
        "num_hash_layers": sum(_hashed(cfg)),
        "hc_mult": s.count,
        "hc_sinkhorn_iters": s.steps,
        "hc_eps": s.eps,
        "swiglu_limit": e.router.gate.limit,
        "rope_theta": cfg.rope.theta,
        "compress_rope_theta": cfg.rope.theta,
        "eos_token_id": cfg.eos_token_ids[0],
    }


def check_trainable(cfg: ModelConfig) -> None:
    """Raise ConfigError with the field whose value the training model does not implement."""
    a, rates = form_of(cfg), {*_rates(cfg)}
    if len({mixer.rope for mixer in cfg.mixers}) > 1:
        raise ConfigError("compress_rope_theta: got another rotation than rope_theta's; expected the same")
    if a.window != BLOCK or rates - KINDS.keys():
        raise ConfigError(
            f"sliding_window, compress_ratios: got {a.window}, {sorted(rates)}; expected "
            f"{BLOCK}, and rates of 0, 4 or 128"
        )
    if (hashed := _hashed(cfg)) != sorted(hashed, reverse=True):
        raise ConfigError("mlp_layer_types: expected hashed layers before all others")


class Streams(nn.Module):
    """Hyper-connections of a half of a layer: how the streams are summed before it and mixed after it.

    ends: they are only summed, after the last layer.
    """

    def __init__(self, spec: StreamSpec, dim: int, ends: bool = False) -> None:
        super().__init__()
        n, p = spec.count, "hc_" if ends else ""
        rows = n if ends else n * (n + 2)
        base = torch.zeros(rows)
        base[:n] = torch.tensor(1 / n).logit()
        if not ends:
            base[2 * n :] = (3 * torch.eye(n)).flatten()  # a stream mostly stays itself
        self.spec, self.names = spec, (p + "fn", p + "base", p + "scale")
        self.register_parameter(self.names[0], nn.Parameter(torch.randn(rows, n * dim) * (n * dim) ** -0.5))
        self.register_parameter(self.names[1], nn.Parameter(base))
        self.register_parameter(self.names[2], nn.Parameter(torch.full((1 if ends else 3,), 0.1)))

    def collapse(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, n, D] -> their sum [B, T, D], and for `spread` the weights [B, T, n] of the output and
        the mixing [B, T, n, n], all float32."""
        n, eps = self.spec.count, self.spec.eps
        weight, base, scale = (getattr(self, name) for name in self.names)
        flat = x.flatten(-2)
        inverse = torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.spec.norm_eps)
        found = F.linear(flat, weight) * inverse
        into = torch.sigmoid(found[..., :n] * scale[0] + base[:n]) + eps
        u = torch.einsum("bti,btid->btd", into, x)
        if len(base) == n:
            return u, into, into
        out = 2 * torch.sigmoid(found[..., n : 2 * n] * scale[1] + base[n : 2 * n])
        mixing = found[..., 2 * n :] * scale[2] + base[2 * n :]
        return u, out, doubly_stochastic(mixing.unflatten(-1, (n, n)), self.spec.steps, eps)

    @staticmethod
    def spread(x: Tensor, y: Tensor, out: Tensor, mixing: Tensor) -> Tensor:
        """Stream j is y [B, T, D] times its weight, and the sum over i of mixing[i, j] times stream i."""
        return out.unsqueeze(-1) * y.float().unsqueeze(-2) + mixing.mT @ x


def doubly_stochastic(scores: Tensor, steps: int, eps: float) -> Tensor:
    """Sinkhorn-Knopp from a softmax [..., n, n]: columns, then rows and columns `steps` - 1 times."""
    m = scores.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(steps - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


class Pool(nn.Module):
    """Makes an entry of every `rate` tokens, from those of the window before it too if they overlap."""

    def __init__(self, dim: int, size: int, rate: int, overlaps: bool, eps: float) -> None:
        super().__init__()
        width = 2 * size if overlaps else size
        self.rate, self.overlaps = rate, overlaps
        self.kv_proj = Linear(dim, width)
        self.gate_proj = Linear(dim, width)
        self.position_bias = nn.Parameter(torch.zeros(rate, width))
        self.kv_norm = RMSNorm(size, eps)
        self.indexer: Index | None = None  # of entries that overlap

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """x [B, T, D] -> entries [B, E, size], rotated by their windows' first positions."""
        values = self.kv_proj(x).unflatten(1, (-1, self.rate))  # [B, E, rate, width]
        gates = self.gate_proj(x).float().unflatten(1, (-1, self.rate)) + self.position_bias
        if self.overlaps:
            values = torch.cat((_earlier(values), values.chunk(2, -1)[1]), 2)
            gates = torch.cat((_earlier(gates, NONE), gates.chunk(2, -1)[1]), 2)
        entries = self.kv_norm((values * gates.softmax(2).to(values.dtype)).sum(2))
        return turned(entries.unsqueeze(2), turn[:: self.rate])[:, :, 0]


def _earlier(x: Tensor, first: float = 0.0) -> Tensor:
    """The first half of the columns of the window before each of x [B, E, rate, width]."""
    half = x.chunk(2, -1)[0]
    return torch.cat((torch.full_like(half[:, :1], first), half[:, :-1]), 1)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """x [B, T, heads, d] with its last elements rotated; turn [T, r/2]."""
    r = 2 * turn.shape[1]
    still, last = x.split((x.shape[-1] - r, r), -1)
    return torch.cat((still, rotate(last, turn)), -1)


class Index(Pool):
    """The lightning indexer of entries. Its inputs are detached: it only learns from attention."""

    def __init__(self, cfg: ModelConfig, rate: int) -> None:
        a, index = form_of(cfg), cfg.index
        assert index is not None
        super().__init__(cfg.hidden_size, index.width, rate, True, cfg.rms_norm_eps)
        self.heads, self.size = index.heads, index.width
        self.q_b_proj = Linear(a.q_lora_rank, self.heads * self.size)
        self.scorer = nn.ModuleDict({"weights_proj": Linear(cfg.hidden_size, self.heads)})
        self.divergence: Tensor | None = None  # from attention, for the last training forward

    def score(self, x: Tensor, latent: Tensor, turn: Tensor, seen: Tensor) -> Tensor:
        """x [B, T, D] and the query latent [B, T, q] -> scores [B, T, E] float32, minus infinity unless
        `seen` [T, E]."""
        x, latent = x.detach(), latent.detach()
        keys = self(x, turn)
        q = turned(self.q_b_proj(latent).unflatten(-1, (self.heads, -1)), turn)
        w = self.scorer["weights_proj"](x).float() * (self.heads * self.size) ** -0.5
        total = sum(w[..., j, None] * (q[:, :, j] @ keys.mT).relu().float() for j in range(self.heads))
        assert isinstance(total, Tensor)
        return total.masked_fill(~seen, NONE)


class WindowAttention(nn.Module):
    """Attention to the last 128 tokens and to entries of all before, with one key that is also the value."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        a, D, eps = form_of(cfg, layer), cfg.hidden_size, cfg.rms_norm_eps
        self.heads, self.eps, self.groups = a.num_attention_heads, eps, a.o_groups
        self.top_k = a.index.top_k if a.index else 0
        self.rate = rate = a.rate
        self.q_a_proj = Linear(D, a.q_lora_rank)
        self.q_a_norm = RMSNorm(a.q_lora_rank, eps)
        self.q_b_proj = Linear(a.q_lora_rank, a.query_width)
        self.kv_proj = Linear(D, a.head_dim)
        self.kv_norm = RMSNorm(a.head_dim, eps)
        self.sinks = nn.Parameter(torch.zeros(a.num_attention_heads))
        self.compressor = Pool(D, a.head_dim, rate, a.index is not None, eps) if rate else None
        if self.compressor is not None and self.compressor.overlaps:
            self.compressor.indexer = Index(cfg, rate)
        self.o_a_proj = Linear(a.query_width // a.o_groups, a.output_width)
        self.o_b_proj = Linear(a.output_width, D, std=0.0)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]; T a multiple of 128."""
        latent = self.q_a_norm(self.q_a_proj(x))
        q = self.q_b_proj(latent).unflatten(-1, (self.heads, -1))
        q = turned(unit(q, self.eps), turn)
        keys = turned(self.kv_norm(self.kv_proj(x)).unsqueeze(2), turn)[:, :, 0]
        entries, chosen, scores, index = None, None, None, None
        if self.compressor is not None:
            entries = self.compressor(x, turn)
            done = torch.arange(1, x.shape[1] + 1, device=x.device) // self.rate
            seen = torch.arange(entries.shape[1], device=x.device) < done[:, None]
            chosen = seen.expand(x.shape[0], -1, -1)
            index = self.compressor.indexer
            if index is not None:
                scores = index.score(x, latent, turn, seen)
                if entries.shape[1] > self.top_k:
                    chosen = best(scores.detach(), self.top_k)
        out, past = attend(q, keys, entries, chosen, self.sinks)
        if index is not None and self.training:
            assert past is not None and scores is not None and chosen is not None
            some = chosen.any(-1)
            index.divergence = divergence(past[some], scores[some], chosen[some])
        out = turned(out, turn.conj())
        grouped = out.flatten(-2).unflatten(-1, (self.groups, -1))  # [B, T, g, H d / g]
        first = self.o_a_proj.weight.to(grouped.dtype).unflatten(0, (self.groups, -1))
        projected: Tensor = self.o_b_proj(torch.einsum("btgi,goi->btgo", grouped, first).flatten(-2))
        return projected


def best(scores: Tensor, k: int) -> Tensor:
    """The k entries with the largest scores [B, T, E], as the engine breaks ties."""
    rows = scores.flatten(0, 1)
    found = top_positions(rows, k).long()
    chosen = torch.zeros(len(rows), scores.shape[-1] + 1, dtype=torch.bool, device=scores.device)
    chosen.scatter_(1, torch.where(found < 0, scores.shape[-1], found), True)
    return chosen[:, :-1].view_as(scores)


def unit(x: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x)."""
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return x * inverse.to(x.dtype)


BLOCK = 128  # queries of a block, and the window


def attend(
    q: Tensor, keys: Tensor, entries: Tensor | None, chosen: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Attention of q [B, T, H, d] to the window of keys [B, T, d], the chosen [B, T, E] entries [B, E, d] and
    a sink per head -> (out [B, T, H, d], mean distribution of the heads over entries [B, T, E] float32,
    without gradient)."""
    B, T, H, d = q.shape
    blocks = T // BLOCK
    rows = (q * d**-0.5).unflatten(1, (blocks, BLOCK)).transpose(2, 3)  # [B, blocks, H, 128, d]
    own = keys.unflatten(1, (blocks, BLOCK))
    pairs = torch.cat((F.pad(own, (0, 0, 0, 0, 1, 0))[:, :-1], own), 2)  # [B, blocks, 256, d]
    at = torch.arange(BLOCK, device=q.device)
    gap = BLOCK + at[:, None] - torch.arange(2 * BLOCK, device=q.device)
    near = ((gap >= 0) & (gap < BLOCK)).expand(blocks, -1, -1).clone()
    near[0, :, :BLOCK] = False
    local = (rows.flatten(2, 3) @ pairs.mT).unflatten(2, (H, BLOCK))
    scores = [local.masked_fill(~near[:, None], NONE)]
    if entries is not None and chosen is not None:
        far = (rows.flatten(1, 3) @ entries.mT).unflatten(1, (blocks, H, BLOCK))
        scores.append(far.masked_fill(~chosen.unflatten(1, (blocks, BLOCK)).unsqueeze(2), NONE))
    scores.append(sinks.to(q.dtype).view(H, 1, 1).expand(B, blocks, H, BLOCK, 1))
    probs = torch.cat(scores, -1).softmax(-1)
    out = (probs[..., : 2 * BLOCK].flatten(2, 3) @ pairs).unflatten(2, (H, BLOCK))
    past = None
    if entries is not None:
        far = probs[..., 2 * BLOCK : -1]
        out = out + (far.flatten(1, 3) @ entries).unflatten(1, (blocks, H, BLOCK))
        past = far.detach().mean(2, dtype=torch.float32).flatten(1, 2)
        past = past / past.sum(-1, keepdim=True).clamp_min(1e-9)
    return out.transpose(2, 3).flatten(1, 2), past


class RootRouter(Router):
    """Scores are roots of softplus; hashed layers take the experts of each token from a table."""

    tid2eid: Tensor | None

    def __init__(self, cfg: ModelConfig, experts: Experts) -> None:
        super().__init__(cfg.hidden_size, experts.router)
        table: Tensor | None = None
        if experts.hashed:
            draws = torch.rand(cfg.vocab_size, len(self.load), generator=torch.Generator().manual_seed(4))
            table = draws.topk(self.rule.top_k).indices
        self.register_buffer("tid2eid", table)

    def scores(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, E] float32."""
        return F.softplus(F.linear(x.float(), self.weight.float())).sqrt()


class StreamedBlock(nn.Module):
    """Both halves of a layer on a float32 residual of several streams."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        assert cfg.streams is not None
        D, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.attn_hc, self.ffn_hc = Streams(cfg.streams, D), Streams(cfg.streams, D)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.self_attn = WindowAttention(cfg, layer)
        experts = cfg.feed(layer).experts
        assert experts is not None, "as every layer of V4 has some"
        self.mlp = MoE(D, experts)
        self.mlp.gate = RootRouter(cfg, experts)

    def forward(self, h: Tensor, turn: Tensor, tokens: Tensor) -> Tensor:
        """h [B, T, n, D] float32 -> [B, T, n, D] float32; tokens [B, T]."""
        u, *mix = self.attn_hc.collapse(h)
        h = Streams.spread(h, self.self_attn(self.input_layernorm(u), turn), *mix)
        u, *mix = self.ffn_hc.collapse(h)
        gate = self.mlp.gate
        assert isinstance(gate, RootRouter)
        ids = None if gate.tid2eid is None else gate.tid2eid[tokens.flatten()]
        return Streams.spread(h, self.mlp(self.post_attention_layernorm(u), ids), *mix)


class DeepSeekV4LM(DeepSeekLM):
    """The complete language model, without MTP layers."""

    def __init__(self, cfg: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(cfg, compute_dtype)
        assert cfg.streams is not None
        self.hc_head = Streams(cfg.streams, cfg.hidden_size, ends=True)

    def check(self, cfg: ModelConfig) -> None:
        check_trainable(cfg)

    def block(self, cfg: ModelConfig, layer: int) -> nn.Module:
        return StreamedBlock(cfg, layer)

    def turns(self, cfg: ModelConfig) -> Tensor:
        length = -(-cfg.max_position_embeddings // BLOCK) * BLOCK
        return rope_table(cfg.rope.theta, form_of(cfg).rotary_width, length)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> hidden states after the final norm [B, T, D] in `compute_dtype`."""
        T = tokens.shape[1]
        if self.cfg.max_position_embeddings < T:
            raise ValueError(
                f"{T} positions exceed max_position_embeddings={self.cfg.max_position_embeddings}"
            )
        tokens = F.pad(tokens, (0, -T % BLOCK))  # later tokens change nothing before them
        h = F.embedding(tokens, self.embed_tokens).unsqueeze(2).expand(-1, -1, self.hc_head.spec.count, -1)
        turn = self.turn[: tokens.shape[1]]
        for layer in self.layers:
            h = layer(h, turn, tokens)
        out: Tensor = self.norm(self.hc_head.collapse(h)[0])[:, :T]
        return out

    def loss(
        self, tokens: Tensor, mtp_weight: float = 0.0, mtp_share: float = 1.0, mtp_greedy: bool = False
    ) -> dict[str, Tensor]:
        """As in `DeepSeekLM`, with the indexers' divergence from attention, which only they learn from."""
        losses = super().loss(tokens, mtp_weight, mtp_share, mtp_greedy)
        found = [m.divergence for m in self.modules() if isinstance(m, Index) and m.divergence is not None]
        if found:
            apart = torch.stack(found).sum()
            losses |= {"loss": losses["loss"] + apart, "index": apart.detach()}
        return losses
