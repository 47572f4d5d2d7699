"""An ESTIMATE of throughput and price of a large deployment: a roofline of declared or measured ceilings.

Prefill and decode run on separate groups of GPUs: data-parallel attention, experts spread over the whole
group, communication overlapped with computation (two micro-batches), perfectly balanced load. Nothing is
measured: losses of a real deployment to imbalance, scheduling and varying traffic are not included.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from farthing.model.config import ModelConfig

FP8, BF16 = 1, 2  # bytes
USABLE_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Ceilings of one GPU; 1 GB = 1e9 bytes."""

    name: str
    memory: float  # GB
    bandwidth: float  # GB/s
    fp8: float  # TFLOP/s
    bf16: float
    nvlink: float  # GB/s per direction
    network: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Shares:
    """Share of each ceiling that kernels reach."""

    dense: float
    grouped: float
    attention: float
    bandwidth: float
    network: float


@dataclass(frozen=True, slots=True)
class Workload:
    """The users' workload."""

    prompt: int  # prompt tokens
    output: int
    cache_hit: float = 0.0  # share of prompt tokens found in the cache
    step_limit: float = 0.05  # maximum seconds per decode step: 1 / (tokens/s per user)


@dataclass(frozen=True, slots=True)
class Phase:
    """Estimate for one GPU of a group of `gpus`."""

    gpus: int
    tokens_per_gpu: int  # per step
    layer_compute: float  # seconds of one MoE layer
    layer_communication: float
    tokens_per_second: float  # per GPU
    bound: str

    def node(self, gpus: int = 8) -> float:
        """Tokens/s per node."""
        return self.tokens_per_second * gpus


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimate for a deployment; dollars per million tokens at a price per GPU-hour."""

    prefill: Phase  # computed prompt tokens
    prefill_with_hits: float  # prompt tokens/s per GPU, including cached ones
    decode: Phase
    usd_input: float
    usd_output: float
    usd_request_output: float  # cost of a whole request divided by its output tokens
    assumptions: tuple[str, ...]


def load_devices(path: Path | None = None) -> tuple[dict[str, Ceilings], Shares]:
    """The declared ceilings, overridden by the user's measurements. Raises ValueError naming the field."""
    raw = tomllib.loads(Path(__file__).with_name("devices.toml").read_text())
    devices = {name: Ceilings(name, **row) for name, row in raw["device"].items()}
    shares = dict(raw["share"])
    if path is not None:
        own = tomllib.loads(path.read_text())
        for name, row in own.get("device", {}).items():
            base = (
                {f.name: getattr(devices[name], f.name) for f in fields(Ceilings)} if name in devices else {}
            )
            devices[name] = _device(name, base | row)
        shares |= own.get("share", {})
    if set(shares) != {f.name for f in fields(Shares)} or not all(0 < s <= 1 for s in shares.values()):
        raise ValueError(f"share is {shares}; expected {[f.name for f in fields(Shares)]}, each in (0, 1]")
    return devices, Shares(**shares)


def estimate(
    config: ModelConfig,
    device: Ceilings,
    shares: Shares,
    workload: Workload,
    price: float,
    prefill_gpus: int = 32,
    decode_gpus: int = 144,
    redundant: int = 32,
) -> Estimate:
    """price: dollars per GPU-hour. redundant: redundant expert copies in each group."""
    prefill = _prefill(_Costs(config, device, shares, prefill_gpus, redundant), workload)
    decode = _decode(_Costs(config, device, shares, decode_gpus, redundant), workload)
    with_hits = prefill.tokens_per_second / (1 - workload.cache_hit)
    usd_input = price / 3600 / with_hits * 1e6
    usd_output = price / 3600 / decode.tokens_per_second * 1e6
    return Estimate(
        prefill,
        with_hits,
        decode,
        usd_input,
        usd_output,
        usd_output + usd_input * workload.prompt / workload.output,
        _assumptions(config, device, shares, workload, prefill, decode, redundant),
    )


class _Costs:
    """Seconds per part of one layer on one GPU."""

    def __init__(
        self, config: ModelConfig, device: Ceilings, shares: Shares, gpus: int, redundant: int
    ) -> None:
        if not config.n_routed_experts:
            raise ValueError("the model has no routed experts; expected a mixture of experts to estimate")
        self.config, self.device, self.gpus = config, device, gpus
        self.experts = max(1, -(-(config.n_routed_experts + redundant) // gpus))
        self.bytes_per_second = device.bandwidth * 1e9 * shares.bandwidth
        self.dense = device.fp8 * 1e12 * shares.dense
        self.grouped = device.fp8 * 1e12 * shares.grouped
        self.attention_flops = device.bf16 * 1e12 * shares.attention
        # One network card per GPU for traffic between nodes, NVLink within a node.
        self.exchange = (device.network if gpus > 8 else device.nvlink) * 1e9 * shares.network

    @property
    def index_share(self) -> float:
        """Share of the hidden layers that have an indexer."""
        layers = self.config.num_hidden_layers
        return sum(map(self.config.has_indexer, range(layers))) / layers

    @property
    def projection(self) -> float:
        """Number of attention weights per layer, with the mean layer's indexer."""
        c, h = self.config, self.config.num_attention_heads
        q = c.q_lora_rank or 0
        query = c.hidden_size * q + q * h * c.qk_head_dim if q else c.hidden_size * h * c.qk_head_dim
        kv = c.hidden_size * c.cache_width + c.kv_lora_rank * h * (c.qk_nope_head_dim + c.v_head_dim)
        index = q * c.index_n_heads * c.index_head_dim + c.hidden_size * (c.index_head_dim + c.index_n_heads)
        return query + kv + h * c.v_head_dim * c.hidden_size + self.index_share * index

    @property
    def cache_bytes(self) -> float:
        """Bytes of a cached token in all layers, with its index keys."""
        c = self.config
        return (c.cache_width + self.index_share * c.index_head_dim) * BF16 * c.num_hidden_layers

    @property
    def expert(self) -> int:
        """Number of weights of one expert."""
        return 3 * self.config.hidden_size * self.config.moe_intermediate_size

    @property
    def weight_bytes(self) -> float:
        """Bytes per GPU: all attention and shared experts and its experts in FP8; embedding, head in bf16."""
        c = self.config
        dense = 3 * c.hidden_size * c.intermediate_size * c.dense_mlps
        experts = c.moe_layers * self.expert * (self.experts + c.n_shared_experts)
        return (
            c.num_hidden_layers * self.projection + dense + experts + 2 * BF16 * c.vocab_size * c.hidden_size
        )

    def gemm(self, weights: float, tokens: float, flops: float) -> float:
        """Seconds of a product: the slower of reading its weights once and its arithmetic."""
        return max(weights * FP8 / self.bytes_per_second, 2 * weights * tokens / flops)

    def feed_forward(self, tokens: float) -> float:
        """Seconds of the shared expert and this GPU's even share of the group's routed tokens."""
        c = self.config
        rows = tokens * c.routed_per_token / self.experts  # rows per local expert
        shared = self.gemm(self.expert * c.n_shared_experts, tokens, self.dense)
        return shared + self.experts * self.gemm(self.expert, rows, self.grouped)

    def exchanged(self, tokens: float, copies: float) -> float:
        """Seconds to dispatch (FP8) and combine (bf16) each token's `copies`."""
        return tokens * copies * self.config.hidden_size * (FP8 + BF16) / self.exchange

    def decode_attention(self, tokens: float, context: float) -> float:
        """Absorbed MLA on a bf16 cache: the slower of reading it and the arithmetic of all heads.

        Sparse attention reads the selected keys, and all index keys where there are more than it selects.
        """
        c = self.config
        attended, scanned = context, 0.0
        if c.index_topk is not None and context > c.index_topk:
            attended, scanned = c.index_topk, context * self.index_share
        read = tokens * (attended * c.cache_width + scanned * c.index_head_dim) * BF16 / self.bytes_per_second
        flops = tokens * (attended * self._absorbed + scanned * self._scored)
        return max(read, flops / self.attention_flops)

    def prefill_attention(self, tokens: float, past: float, new: float) -> float:
        """Expanded heads, causal: each of `new` prompt tokens attends to `past` and half of the new ones.

        Sparse attention also scores the index keys of every token behind the first `index_topk`, then either
        masks expanded heads or reads the selected keys in absorbed form, whichever is faster.
        """
        c = self.config
        dense = 2 * (past + new / 2) * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
        if c.index_topk is None or past + new <= c.index_topk:
            return tokens * dense / self.attention_flops
        first = max(c.index_topk - past, 0)  # new tokens that select nothing
        attended = (first * (past + first / 2) + (new - first) * c.index_topk) / new
        scanned = (new - first) * (past + (first + new) / 2) / new * self.index_share
        return (
            tokens * (min(dense, attended * self._absorbed) + scanned * self._scored) / self.attention_flops
        )

    @property
    def _absorbed(self) -> int:
        """Operations per query and key on the latent, all heads."""
        c = self.config
        return 2 * c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)

    @property
    def _scored(self) -> int:
        """Operations per query and index key."""
        return 2 * self.config.index_n_heads * self.config.index_head_dim


def _prefill(costs: _Costs, workload: Workload) -> Phase:
    """Long steps of 16,384 tokens per GPU, which amortize reading the weights."""
    c, tokens = costs.config, 16384
    past = workload.prompt * workload.cache_hit
    compute = (
        costs.gemm(costs.projection, tokens, costs.dense)
        + costs.prefill_attention(tokens, past, workload.prompt - past)
        + costs.feed_forward(tokens)
    )
    nodes = max(1, costs.gpus // 8)
    # Group-limited routing: a token goes to at most topk_group nodes, once to each.
    copies = (
        min(c.topk_group if c.n_group > 1 else c.routed_per_token, nodes)
        if nodes > 1
        else (min(c.routed_per_token, costs.gpus) * (costs.gpus - 1) / costs.gpus)
    )
    remote = copies * (nodes - 1) / nodes if nodes > 1 else copies
    return _phase(costs, tokens, compute, costs.exchanged(tokens, remote))


def _decode(costs: _Costs, workload: Workload) -> Phase:
    """The most sequences per GPU that memory and the step limit allow."""
    c = costs.config
    context = workload.prompt + workload.output / 2
    free = costs.device.memory * 1e9 * USABLE_MEMORY - costs.weight_bytes
    most = int(free // (context * costs.cache_bytes))
    if most < 1:
        raise ValueError(
            f"{costs.gpus} GPUs {costs.device.name} store {costs.weight_bytes / 1e9:.0f} GB of weights each "
            f"and no sequence of {context:.0f} tokens; expected more GPUs or more memory"
        )

    def phase(tokens: int) -> Phase:
        compute = (
            costs.gemm(costs.projection, tokens, costs.dense)
            + costs.decode_attention(tokens, context)
            + costs.feed_forward(tokens)
        )
        remote = c.routed_per_token * (costs.gpus - 1) / costs.gpus
        return _phase(costs, tokens, compute, costs.exchanged(tokens, remote))

    low, high = 1, most
    while low < high:  # the largest batch within the limit
        middle = (low + high + 1) // 2
        p = phase(middle)
        low, high = (
            (middle, high) if middle / p.tokens_per_second <= workload.step_limit else (low, middle - 1)
        )
    return phase(low)


def _phase(costs: _Costs, tokens: int, compute: float, communication: float) -> Phase:
    """Communication overlaps with the other micro-batch's computation; the longer one counts."""
    c = costs.config
    attention = compute - costs.feed_forward(tokens)
    dense_mlp = costs.gemm(3 * c.hidden_size * c.intermediate_size, tokens, costs.dense)
    head = 2 * c.vocab_size * c.hidden_size * BF16 / costs.bytes_per_second
    without_experts = (c.num_hidden_layers - c.moe_layers) * attention + c.dense_mlps * dense_mlp
    step = c.moe_layers * max(compute, communication) + without_experts + head
    bound = "communication" if communication > compute else "computation and memory"
    return Phase(costs.gpus, tokens, compute, communication, tokens / step, bound)


def _assumptions(
    c: ModelConfig,
    device: Ceilings,
    shares: Shares,
    w: Workload,
    prefill: Phase,
    decode: Phase,
    redundant: int,
) -> tuple[str, ...]:
    sparse = c.index_topk and (
        f"sparse attention: a token attends to at most {c.index_topk:,} keys; in longer contexts, all index "
        "keys (bf16) are scored"
    )
    kind = "measured" if device.measured else "declared"
    return (
        f"{kind} ceilings of {device.name}: {device.memory:g} GB, {device.bandwidth:g} GB/s, "
        f"FP8 {device.fp8:g} and bf16 {device.bf16:g} TFLOP/s, NVLink {device.nvlink:g} and network "
        f"{device.network:g} GB/s",
        f"kernels reach {shares.dense:.0%} (dense) and {shares.grouped:.0%} (grouped) of FP8, "
        f"{shares.attention:.0%} of bf16 in attention, {shares.bandwidth:.0%} of memory bandwidth, "
        f"{shares.network:.0%} of the network",
        f"prompts of {w.prompt:,} tokens, {w.cache_hit:.1%} of them cached; {w.output:,} output tokens",
        f"a decode step takes at most {w.step_limit * 1000:.0f} ms, {1 / w.step_limit:.0f} tokens/s per user",
        f"prefill on groups of {prefill.gpus} GPUs, {prefill.tokens_per_gpu:,} tokens per GPU and step; "
        f"decode on groups of {decode.gpus}, {decode.tokens_per_gpu:,} sequences per GPU; {redundant} "
        "redundant experts in each",
        "attention data-parallel; weights FP8, cache, attention and combine bf16, dispatch FP8",
        *([sparse] if sparse else []),
        "no speculation",
        "communication and computation overlap fully; experts and GPUs evenly loaded; no idle GPU",
    )


def _device(name: str, row: Mapping[str, Any]) -> Ceilings:
    known = {f.name for f in fields(Ceilings)}
    missing = known - set(row) - {"name", "measured"}
    if missing or set(row) - known:
        raise ValueError(f"device.{name} has {sorted(row)}; expected {sorted(known - {'name', 'measured'})}")
    return Ceilings(**{**row, "name": name, "measured": True})
