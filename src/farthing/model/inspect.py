"""Cost per token from the architecture alone (parameters, bytes, FLOPs), and measured routing balance.

A multiply-add counts as two FLOPs. "Dense model of the same size" has every parameter active for every
token, except for an untied embedding, of which a token reads one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from farthing.checkpoint.reader import Checkpoint
from farthing.lazy import torch
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.kinds import cache_kinds
from farthing.model.load import names_in
from farthing.model.parameters import each_kind, layer_of
from farthing.model.source import stack_of
from farthing.model.spec import Tensor, of_expert
from farthing.ops.torch_util import make_batch


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Per-token figures of the main model (MTP layers are counted in `mtp_parameters` only)."""

    total_parameters: int
    active_parameters: int  # read per token: one embedding row, the head, top_k experts per layer
    head_parameters: int
    mtp_parameters: int
    routed_parameters: int
    active_routed_parameters: int
    weight_bytes: int  # total, as stored
    active_bytes: int  # read per token at batch 1, as stored
    kv_bytes_per_token: int  # bf16, of the layers that keep every token
    kv_bytes_per_sequence: int  # of windows, bf16, and recurrent states, once a sequence is long enough
    flops_per_token: int  # excluding attention over the context
    attention_flops_per_context_token: int  # that a further token of a long context adds to a step
    dense_flops_per_token: int  # a dense model of the same parameters

    @property
    def compute_saved(self) -> float:
        """1 - FLOPs / FLOPs of the dense model of the same size."""
        return 1 - self.flops_per_token / self.dense_flops_per_token


def model_cost(config: ModelConfig, nbytes: Callable[[str], int] | None = None) -> ModelCost:
    """Figures from config.json; `nbytes(parameter name)` gives stored bytes, else bf16 is assumed."""
    kinds = [_Counted(t, config, nbytes) for t in each_kind(config)]
    main = [k for k in kinds if k.layer is None or k.layer < config.num_hidden_layers]
    routed = [k for k in main if k.tensor.expert is not None]
    embedding, *rest = main
    always = [k for k in rest if k.tensor.expert is None]
    tied = config.head.tie_word_embeddings
    # A tied embedding is read whole as the head; of an untied one, one row is read.
    head_rows = config.vocab_size if tied else 1
    active_routed = round(sum(k.numbers * k.read for k in routed))
    matrices = [k for k in (main if tied else rest) if len(k.tensor.shape) == 2]
    dense = sum(k.numbers for k in matrices)
    total, of_experts = (sum(k.numbers for k in group) for group in (main, routed))
    hidden = range(config.num_hidden_layers)
    first, *others = (kind.held_by(hidden) for kind in cache_kinds(config))
    first = replace(first, index_rows=sum(map(config.has_indexer, hidden)))
    return ModelCost(
        total_parameters=total,
        active_parameters=sum(k.numbers for k in always) + active_routed + head_rows * config.hidden_size,
        head_parameters=config.vocab_size * config.hidden_size,
        mtp_parameters=sum(k.numbers for k in kinds) - total,
        routed_parameters=of_experts,
        active_routed_parameters=active_routed,
        weight_bytes=sum(k.nbytes for k in kinds),
        active_bytes=sum(k.nbytes for k in always)
        + round(sum(k.nbytes * k.read for k in routed))
        + embedding.nbytes * head_rows // config.vocab_size,
        kv_bytes_per_token=first.token_bytes("bfloat16"),
        kv_bytes_per_sequence=sum(
            (kind.window or 0) * kind.token_bytes("bfloat16") + kind.state_bytes for kind in others
        ),
        flops_per_token=2 * (dense - of_experts + active_routed),
        attention_flops_per_context_token=_flops_added(config),
        dense_flops_per_token=2 * dense,
    )


class _Counted:
    """A parameter of a layer, and of all routed experts that have one like it."""

    def __init__(self, tensor: Tensor, config: ModelConfig, nbytes: Callable[[str], int] | None) -> None:
        self.tensor, self.layer, self.read, count = tensor, layer_of(tensor.name), 1.0, 1
        if tensor.expert is not None:
            assert self.layer is not None
            experts = config.feed(self.layer).experts
            assert experts is not None
            count, self.read = experts.count, experts.per_token / experts.count
        self.numbers = prod(tensor.shape) * count
        self.nbytes = 2 * self.numbers
        if nbytes is not None:
            self.nbytes = sum(nbytes(of_expert(tensor, e).name if e else tensor.name) for e in range(count))


def attending(config: ModelConfig) -> list[int]:
    """The hidden layers with attention."""
    return [i for i in range(config.num_hidden_layers) if config.mixer(i).cache_rows]


def _flops_added(config: ModelConfig, context: int = 1 << 20) -> int:
    """By a token of the context, where it is longer than windows and than what an indexer selects."""
    return (context_cost(config, 2 * context).flops - context_cost(config, context).flops) // context


def _attention_flops(config: ModelConfig, layer: int) -> int:
    """Per pair of tokens."""
    return 2 * config.num_attention_heads * config.mixer(layer).dot_width


def checkpoint_cost(path: Path) -> ModelCost:
    """Figures of a checkpoint with its actual stored bytes, quantized or not."""
    checkpoint = Checkpoint.open(path)
    by_module: dict[str, int] = {}
    for name in checkpoint.names():
        module = name.rpartition(".")[0]
        by_module[module] = by_module.get(module, 0) + checkpoint.nbytes(name)
    config = ModelConfig.from_json(checkpoint.config)
    stored = names_in(checkpoint, config).stored

    def size(name: str) -> int:
        if name.endswith("bias"):
            return 0  # a module's weight and bias share it: its bytes are given to the weight
        module = stored(name).rpartition(".")[0]
        if module in by_module or ".experts." not in name:
            return by_module.get(module, 0)
        stack = stack_of(name)  # one tensor, or several, for all experts of the layer
        share, whole = 1 if stack.endswith("down_proj") else 2, stored(stack)
        experts = config.experts_in(int(name.split(".")[2])) or 1
        parts = (whole + suffix for suffix in ("", "_blocks", "_scales", "_bias"))
        return sum(checkpoint.nbytes(p) for p in parts if checkpoint.has(p)) // (share * experts)

    return model_cost(config, size)


@dataclass(frozen=True, slots=True)
class ContextCost:
    """Attention cost per token at a context length, over all layers."""

    context: int  # tokens
    flops: int
    bytes: int  # bytes read from the bf16 cache
    dense_flops: int  # FLOPs without an indexer
    dense_bytes: int


def context_cost(config: ModelConfig, context: int) -> ContextCost:
    """Decode, of latent attention in absorbed form: scores and values; the scan of index keys."""
    c = config
    heads, width = (c.index.heads, c.index.width) if c.index else (0, 0)
    mixers = c.mixers[: c.num_hidden_layers]
    scanned = sum(mixer.keys_scanned(context) for mixer in mixers)
    index = 2 * width * scanned  # FLOPs per head, and bytes

    def over(dense: bool, each: Callable[[int], int]) -> int:
        return sum(each(i) * c.mixer(i).keys_read(context, dense) for i in attending(c))

    def flops(layer: int) -> int:
        return _attention_flops(c, layer)

    def size(layer: int) -> int:
        of = c.mixer(layer)
        return 2 * of.cache_rows * of.cache_width

    return ContextCost(
        context,
        over(False, flops) + index * heads,
        over(False, size) + index,
        over(True, flops),
        over(True, size),
    )


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Measured routing statistics of a set of prompts."""

    tokens: int
    experts_per_token: float  # mean over MoE layers, adaptive experts included
    tokens_per_expert: list[list[int]]  # [MoE layer][expert]
    imbalance: list[float]  # busiest expert / mean, per layer
    unused: int  # (layer, expert) pairs selected by no token
    compute_saved: float  # against a dense model of the same size, with the measured experts per token


def routing_report(model: DecoderModel, prompts: Sequence[Sequence[int]]) -> RoutingReport:
    """Run token lists through the model and count routed tokens."""
    config = model.config
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe(i)]
    if not layers:
        raise ValueError("the model has no MoE layer: there is no routing to report")
    counts = torch.zeros(model.cache_layers, config.router_size, dtype=torch.int64)
    tokens = 0
    for ids in prompts:
        window = torch.tensor(ids[: config.max_position_embeddings], dtype=torch.int64)
        if not len(window):
            continue
        blocks = list(range(-(-len(window) // 16)))
        with torch.inference_mode():
            model.forward(
                window, make_batch([len(window)], [0], [blocks], 16), model.new_cache(len(blocks)), counts
            )
        tokens += len(window)
    if not tokens:
        raise ValueError("the prompts have no tokens; expected text")
    rows = [counts[i, : config.n_routed_experts].tolist() for i in layers]
    per_token = sum(map(sum, rows)) / (tokens * len(rows))
    cost = model_cost(config)
    skipped = cost.active_routed_parameters * (1 - per_token / config.routed_per_token)
    return RoutingReport(
        tokens=tokens,
        experts_per_token=per_token,
        tokens_per_expert=rows,
        imbalance=[max(r) * len(r) / max(sum(r), 1) for r in rows],
        unused=sum(r.count(0) for r in rows),
        compute_saved=1 - (cost.flops_per_token - 2 * skipped) / cost.dense_flops_per_token,
    )
