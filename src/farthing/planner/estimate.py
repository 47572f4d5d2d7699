"""ESTIMATE of throughput and price of a deployment: a roofline of declared or measured ceilings.

`serving` estimates what `farthing serve` runs: one layout whose GPUs compute prompts and decode in turn.
`groups` estimates deployments as DeepSeek and SGLang published them: separate groups of GPUs for prefill and
decode, data-parallel attention, experts spread over the whole group, communication behind computation.
Nothing is measured: losses to imbalance, scheduling and varying traffic are not included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import groupby
from math import ceil, prod
from pathlib import Path
from typing import Any

from farthing.model.config import ModelConfig
from farthing.model.spec import FEED, Tensor
from farthing.ops.weights import FP8_BLOCK, INTEGERS
from farthing.parallel.plan import MICRO_ROWS, Layout, ShardPlan
from farthing.planner.buffers import Serving
from farthing.planner.footprint import FLOAT_BYTES, Holder, Stored
from farthing.planner.memory import (
    PlannedModel,
    RankMemory,
    cache_bytes_per_token,
    experts_per_rank,
    fitting_layouts,
    shares_by_format,
    stage_memory,
)
from farthing.planner.roofline import BF16, FP8, NODE, Ceilings, Efficiency, RankRoofline, Workload
from farthing.quants import SUFFIX

# Share of bandwidth while decoding: of V2-Lite and of the 3B random model (docs/lab/cpu-against-peers.md).
BANDWIDTH = (0.65, 0.85)
INT8 = 0.60  # share of the INT8 peak with 512 rows: L576's
MOST_ATTENTION = 0.5  # of the INT8 peak: bfloat16 has half the operations per instruction …
ATTENTION = 0.4  # … of which expanded attention reaches 80 to 87 %
JOINS = 15  # times per layer that threads wait for each other (`barrier` and regions in native/)
BATCHES = (1, 8, 16, 32, 64)
CHUNK = 512  # prompt tokens per step


@dataclass(frozen=True, slots=True)
class Machine:
    """Sockets of equal cores."""

    sockets: int
    cores: int  # per socket
    bandwidth: float  # GB/s per socket
    int8: float  # GOP/s per core

    @property
    def peak(self) -> float:
        """INT8 TOP/s of all cores."""
        return self.sockets * self.cores * self.int8 / 1000


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """A decode step of `batch` sequences: tokens per second at the ceilings, and at the measured shares."""

    batch: int
    gigabytes: float  # read
    limit: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CpuEstimate:
    """One replica on all sockets.

    Each socket reads its own panels of every matrix (`threads.h`), so the bandwidths of the sockets
    add up, and so do the peaks of the cores. The shares of both ceilings that kernels reach are measured on
    two cores. Waiting for other threads is not counted; `joins` says how often a step does.
    """

    steps: tuple[DecodeSpeed, ...]
    prefill_limit: float  # prompt tokens/s
    prefill: float  # at the measured shares
    joins: int  # per step


def estimate(
    model: PlannedModel, holder: Holder, machine: Machine, workload: Workload, cache_dtype: str
) -> CpuEstimate:
    """Decoding within `workload`, and chunks of its prompts. Raises ValueError for weights other than
    integers, whose products have other ceilings than INT8's."""
    floats = sorted({s.kind for t, s in model.matrices if not _is_integer(holder, t, s)})
    if floats:
        raise ValueError(
            f"quantization: got {holder.quantization!r} for weights in {', '.join(floats)}; expected int4 or "
            "int8: the estimate uses the INT8 ceiling"
        )

    def server(bandwidth: float, peak: float, shares: Efficiency) -> _Server:
        return _Server(model, holder, Ceilings("CPU", 0, bandwidth, peak, peak, 0, 0), shares, cache_dtype)

    everything = Efficiency(1.0, 1.0, MOST_ATTENTION, 1.0, 1.0)
    sizes = server(1.0, 1e9, everything)  # at 1 GB/s, seconds are gigabytes
    bandwidth = machine.sockets * machine.bandwidth
    limit = server(bandwidth, machine.peak, everything)
    low, high = (
        server(bandwidth, machine.peak, Efficiency(INT8, INT8, ATTENTION, share, 1.0)) for share in BANDWIDTH
    )
    steps = [
        DecodeSpeed(n, sizes.decode(n, workload), *(n / s.decode(n, workload) for s in (limit, low, high)))
        for n in BATCHES
    ]
    tokens = min(CHUNK, workload.prompt)
    most, reached = (tokens / s.prefill(tokens) for s in (limit, low))
    return CpuEstimate(tuple(steps), most, reached, JOINS * model.config.num_hidden_layers)


def _is_integer(holder: Holder, tensor: Tensor, stored: Stored) -> bool:
    return holder.rounded(stored, 64, mlp=tensor.part in FEED).kind in INTEGERS


class _Server:
    """All sockets as one device."""

    def __init__(
        self, model: PlannedModel, holder: Holder, device: Ceilings, shares: Efficiency, cache_dtype: str
    ) -> None:
        plan = ShardPlan.build(model.config, Layout())
        experts = model.config.n_routed_experts
        self._rank = RankRoofline(
            model, plan, plan.layout.place(0), holder, device, shares, cache_dtype, experts
        )

    def decode(self, batch: int, workload: Workload) -> float:
        """Seconds of a step."""
        return self._step(batch, workload, batch, decode=True)

    def prefill(self, tokens: int) -> float:
        """Seconds of a whole prompt in one step."""
        return self._step(tokens, Workload(tokens, 0), 1, decode=False)

    def _step(self, tokens: int, workload: Workload, logits: int, decode: bool) -> float:
        rank = self._rank
        layers = sum(rank.layer(i, tokens, tokens, workload, decode) for i in rank.layers)
        return layers + rank.products(rank.head, logits)


PREFILL_TOKENS = 16384  # per GPU and step of a prefill group: long steps amortize reading the weights


@dataclass(frozen=True, slots=True)
class Target:
    """A model on GPUs of one kind. serving.cache_tokens: most tokens per rank; 0: as many as fit.

    sequences: most sequences that decode together, of a replica or of a decode GPU; None: as many as fit.
    """

    model: PlannedModel
    holder: Holder
    serving: Serving
    limit: int  # bytes per GPU
    device: Ceilings
    shares: Efficiency
    sequences: int | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.model.config


@dataclass(frozen=True, slots=True)
class Phase:
    """Estimate for the GPUs that run a phase together."""

    gpus: int
    tokens_per_step: int  # of all these GPUs; decode: sequences
    step: float  # seconds
    communication: float  # seconds of it, or hidden behind computation in groups
    tokens_per_second: float  # per GPU
    bound: str

    def node(self, gpus: int = NODE) -> float:
        """Tokens/s per node."""
        return self.tokens_per_second * gpus


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimate for a deployment; dollars per million tokens at a price per GPU-hour."""

    layout: Layout | None  # None: separate groups
    prefill: Phase  # computed prompt tokens
    prefill_with_hits: float  # prompt tokens/s per GPU, including cached ones
    decode: Phase
    memory: RankMemory  # of the fullest GPU; in groups, of a decode GPU
    limit: int  # bytes per GPU
    cache_tokens: int  # that fit, per replica or decode GPU
    usd_input: float
    usd_output: float
    usd_request_output: float  # cost of a whole request divided by its output tokens
    assumptions: tuple[str, ...]


def serving(target: Target, layout: Layout, workload: Workload, price: float) -> Estimate:
    """One replica of `layout`; price: dollars per GPU-hour. Raises ValueError where nothing fits."""
    replica = _Replica(target, ShardPlan.build(target.config, layout))
    prefill = replica.phase(target.serving.max_num_batched_tokens, workload, decode=False)
    return _estimate(replica, prefill, workload, price)


def smallest(
    target: Target, workload: Workload, price: float, dispatched: Workload | None, most: int = 64
) -> Estimate:
    """The cheapest of the layouts with the fewest GPUs that fit and reach the user rate.

    dispatched: the workload of layouts with data-parallel attention, which have no prefix cache; None: no
    such layouts. Raises ValueError if no layout of up to `most` GPUs will do.
    """
    one = replace(target.serving, cache_tokens=ceil(workload.context), max_num_seqs=1)
    refused: ValueError | None = None
    fitting = fitting_layouts(target.model, target.holder, one, target.limit, most)
    for _, layouts in groupby(fitting, key=lambda layout: layout.world):
        candidates = []
        for layout, load in _with_dispatch(layouts, workload, dispatched):
            try:
                candidates.append(serving(target, layout, load, price))
            except ValueError as error:
                refused = error
        if candidates:
            return min(candidates, key=lambda e: e.usd_request_output)
    raise refused or ValueError(
        f"no layout of up to {most} GPUs of {target.limit / 1e9:.1f} GB fits the weights and a sequence of "
        f"{workload.context:,.0f} tokens; expected GPUs with more memory, fewer bits or shorter prompts"
    )


def _with_dispatch(
    layouts: Iterable[Layout], workload: Workload, dispatched: Workload | None
) -> Iterator[tuple[Layout, Workload]]:
    """Layouts, and the same ones with data-parallel attention; redundant experts must divide evenly."""
    for layout in layouts:
        yield layout, workload
        if dispatched is not None and layout.ep > layout.tp:
            yield replace(layout, dp_attention=True), dispatched


def groups(target: Target, prefill_gpus: int, decode_gpus: int, workload: Workload, price: float) -> Estimate:
    """Separate groups for prefill and decode; price: dollars per GPU-hour."""
    first, second = (_Group(target, ShardPlan.spread(target.config, n)) for n in (prefill_gpus, decode_gpus))
    if (room := first.room(1)) < workload.prompt:
        raise ValueError(first.too_small(room, workload.prompt))
    prefill = first.phase(PREFILL_TOKENS * prefill_gpus, workload, decode=False)
    return _estimate(second, prefill, workload, price)


class _Replica:
    """One layout as `farthing serve` runs it: communication is not overlapped."""

    caches = 1  # separate ones: every rank of a replica has the blocks of all its sequences

    def __init__(self, target: Target, plan: ShardPlan) -> None:
        self.target, self.plan, self.layout = target, plan, plan.layout
        experts = experts_per_rank(target.config, plan.layout, target.serving.redundant_experts)
        self.stages = [
            RankRoofline(
                target.model,
                plan,
                plan.layout.place(stage * plan.layout.stage_ranks),
                target.holder,
                target.device,
                target.shares,
                target.serving.cache_dtype,
                experts,
            )
            for stage in range(plan.layout.pp)
        ]

    def room(self, sequences: int) -> int:
        """Cache tokens that fit on the fullest rank, at most those requested; 0 or less: none."""
        t = self.target
        empty = replace(t.serving, cache_tokens=0, max_num_seqs=sequences)
        fitting = min(
            (t.limit - r.total) // cache_bytes_per_token(self.plan, self.layout.place(r.rank), t.serving)
            for r in self._ranks(empty)
        )
        fitting -= fitting % t.serving.block_size
        return min(fitting, t.serving.cache_tokens) if t.serving.cache_tokens else fitting

    def filled(self, cache_tokens: int, sequences: int) -> RankMemory:
        """The fullest rank with that cache."""
        full = replace(self.target.serving, cache_tokens=cache_tokens, max_num_seqs=sequences)
        return max(self._ranks(full), key=lambda r: r.total)

    def _ranks(self, serving: Serving) -> list[RankMemory]:
        return stage_memory(self.target.model, self.plan, self.target.holder, serving)

    def decode(self, workload: Workload) -> Phase:
        """The most sequences that memory, the requested limit and the step limit allow."""
        most, least = 1, self.target.sequences
        for _ in range(2):  # tables grow with the number of sequences
            room = self.room(most)
            most = int(room // workload.context)
            most = most if least is None else min(most, least)
            if most < 1:
                raise ValueError(self.too_small(room, workload.context))

        def phase(each: int) -> Phase:
            return self.phase(each * self.caches, workload, decode=True)

        low, high = 1, most
        while low < high:  # the largest batch within the limit
            middle = (low + high + 1) // 2
            within = phase(middle).step <= workload.step_limit
            low, high = (middle, high) if within else (low, middle - 1)
        step = phase(low)
        if step.step > workload.step_limit:
            raise ValueError(
                f"user_rate: got {1 / workload.step_limit:g}; expected at most {1 / step.step:.1f}: a "
                f"decode step of one sequence takes {step.step * 1000:.1f} ms on {self.layout.world} x "
                f"{self.target.device.name}"
            )
        return step

    def too_small(self, room: int, context: float) -> str:
        """The message for a deployment without room for one sequence."""
        return (
            f"{self.layout.world} x {self.target.device.name} need {self.filled(0, 1).total / 1e9:.1f} GB "
            f"each before any cache and {self.target.limit / 1e9:.1f} GB are usable, which leaves "
            f"{max(room, 0):,} cache tokens for sequences of {context:,.0f}; expected more GPUs, more memory "
            "or shorter prompts"
        )

    def phase(self, tokens: int, workload: Workload, decode: bool) -> Phase:
        """A step of `tokens` of all GPUs together."""
        layout, hidden = self.layout, self.target.config.hidden_size
        batches = 1 if layout.dp_attention else max(1, min(layout.pp, tokens // MICRO_ROWS))
        rows = tokens / batches
        own = max(rows / layout.copies, 1) if layout.dp_attention else rows
        compute = [
            sum(stage.layer(i, own, rows, workload, decode) for i in stage.layers) for stage in self.stages
        ]
        sent = [sum(self._sent(stage, i, own, rows) for i in stage.layers) for stage in self.stages]
        turns = [a + b for a, b in zip(compute, sent, strict=True)]
        first, hops = self.stages[0], layout.pp + batches - 2
        over = rows * hidden * BF16 / first.link(layout.world) * hops if layout.pp > 1 else 0.0
        logits = tokens if decode else 1
        step = sum(turns) + (batches - 1) * max(turns) + over + first.products(first.head, logits)
        moved = sum(sent) + over
        return _phase(layout.world, tokens, step, moved, moved > sum(compute))

    def _sent(self, stage: RankRoofline, layer: int, own: float, rows: float) -> float:
        """Seconds of a layer's collectives: sums over tp ranks, and over all ranks that share the experts."""
        layout, c = self.layout, self.target.config
        over = stage.summed(own, layout.tp)  # after attention
        if not c.is_moe(layer):
            return 2 * over
        over *= 1 + c.feed(layer).delayed  # of the dense MLP
        if not layout.dp_attention:
            return over + stage.summed(rows, layout.stage_ranks)
        missed = float((1 - 1 / layout.ep) ** c.routed_per_token)
        reached = (layout.ep - 1) * (1 - missed)  # ranks with an expert
        moved = own / layout.tp * reached * c.hidden_size * 2 * BF16  # dispatch and combine
        return over + stage.summed(own, layout.tp) + moved / stage.link(layout.ep)


class _Group(_Replica):
    """Experts spread over all GPUs, each with its own sequences; two micro-batches hide communication."""

    def __init__(self, target: Target, plan: ShardPlan) -> None:
        super().__init__(target, plan)
        self.caches = plan.layout.world

    def phase(self, tokens: int, workload: Workload, decode: bool) -> Phase:
        """The longer of a layer's computation and its exchange counts."""
        gpus, stage, c = self.layout.world, self.stages[0], self.target.config
        own = tokens / gpus
        copies = c.routed_per_token * (gpus - 1) / gpus if decode else self._prompt_copies()
        exchange = own * copies * c.hidden_size * (FP8 + BF16) / stage.link(gpus)
        layers = {i: stage.layer(i, own, tokens, workload, decode) for i in stage.layers}
        with_experts = sum(seconds for i, seconds in layers.items() if c.is_moe(i))
        moved = exchange * c.moe_layers
        step = sum(max(s, exchange * c.is_moe(i)) for i, s in layers.items())
        step += stage.products(stage.head, own if decode else 1)
        return _phase(gpus, tokens, step, moved, moved > with_experts)

    def _prompt_copies(self) -> float:
        """Group-limited routing: a token goes to at most topk_group nodes, once to each."""
        c, gpus = self.target.config, self.layout.world
        nodes = max(1, gpus // NODE)
        if nodes == 1:
            return min(c.routed_per_token, gpus) * (gpus - 1) / gpus
        groups = c.experts.router.top_k_groups if c.experts and c.experts.router.num_groups > 1 else None
        return min(groups or c.routed_per_token, nodes) * (nodes - 1) / nodes


def _phase(gpus: int, tokens: int, step: float, moved: float, bound: bool) -> Phase:
    kind = "communication" if bound else "computation and memory"
    return Phase(gpus, tokens, step, moved, tokens / step / gpus, kind)


def _estimate(replica: _Replica, prefill: Phase, workload: Workload, price: float) -> Estimate:
    decode = replica.decode(workload)
    with_hits = prefill.tokens_per_second / (1 - workload.cache_hit)
    usd_input = price / 3600 / with_hits * 1e6
    usd_output = price / 3600 / decode.tokens_per_second * 1e6
    sequences = decode.tokens_per_step // replica.caches
    room = replica.room(sequences)
    return Estimate(
        None if isinstance(replica, _Group) else replica.layout,
        prefill,
        with_hits,
        decode,
        replica.filled(room, sequences),
        replica.target.limit,
        room,
        usd_input,
        usd_output,
        usd_output + usd_input * workload.prompt / workload.output,
        _assumptions(replica, workload),
    )


def _assumptions(replica: _Replica, w: Workload) -> tuple[str, ...]:
    t, c = replica.target, replica.target.config
    device, shares, separate = t.device, t.shares, isinstance(replica, _Group)
    most, kept = c.index and c.index.top_k, "entries" if c.block_tokens > 1 else "keys"
    sparse = most and (
        f"sparse attention: a token attends to at most {most:,} {kept} that "
        f"an indexer selects; in longer contexts, all index keys ({t.serving.cache_dtype}) are scored"
    )
    kind = "measured" if device.measured else "declared"
    formats = ", ".join(f"{k} {share:.1%}" for k, share in shares_by_format(t.model, t.holder).items())
    how = (
        "attention data-parallel; dispatch FP8, combine bf16; communication and computation overlap fully"
        if separate
        else "prompts and decoding take turns on the same GPUs, and each pays for its time; the rate per "
        "user is that of decode steps alone; communication is not overlapped"
    )
    return (
        f"{kind} ceilings of {device.name}: {device.memory:g} GB, {device.bandwidth:g} GB/s, "
        f"FP8 {device.fp8:g} and bf16 {device.bf16:g} TFLOP/s, NVLink {device.nvlink:g} and network "
        f"{device.network:g} GB/s",
        f"kernels reach {shares.dense:.0%} (dense) and {shares.grouped:.0%} (grouped) of FP8 and bf16, "
        f"{shares.attention:.0%} of bf16 in attention, {shares.bandwidth:.0%} of memory bandwidth, "
        f"{shares.network:.0%} of the network",
        f"parameters: {formats}; FP8 ones are multiplied in FP8, others in bf16",
        f"cache: {t.serving.cache_dtype}",
        f"prompts of {w.prompt:,} tokens, {w.cache_hit:.1%} of them cached; {w.output:,} output tokens",
        f"a decode step takes at most {w.step_limit * 1000:.0f} ms, {1 / w.step_limit:g} tokens/s per user",
        f"{t.serving.redundant_experts} redundant experts per layer" + " and group" * separate,
        how,
        *([sparse] if sparse else []),
        "no speculation",
        "experts and GPUs evenly loaded; no idle GPU",
    )


# Configurations of released models by name, as package data, to plan before downloading a model.

_CONFIGS = Path(__file__).parents[1] / "assets" / "configs"
# Later releases with the architecture of an earlier one, according to their model cards.
SAME = {
    "deepseek-v3-0324": "deepseek-v3",
    "deepseek-r1-0528": "deepseek-r1",
    "deepseek-v3.1-terminus": "deepseek-v3.1",
    "deepseek-v3.2-exp": "deepseek-v3.2",
    "deepseek-v3.2-speciale": "deepseek-v3.2",
    "kimi-k2.6": "kimi-k2.5",
    "kimi-k2-instruct": "kimi-k2",
    "glm-5.1": "glm-5",
    "glm-4.7": "glm-4.6",
    "qwen3-coder-30b-a3b": "qwen3-30b-a3b-2507",
    "llama-3.3-70b": "llama-3.1-70b",
    "qwen3.6-35b-a3b": "qwen3.5-35b-a3b",
    "qwen3-coder-next": "qwen3-next-80b-a3b",
}
_UNSUPPORTED = ("deepseek-v4.1",)  # known names whose architecture is not served


def published() -> list[str]:
    """Names accepted by `published_config`."""
    return sorted([*SAME, *(file.stem for file in _CONFIGS.glob("*.json"))])


def published_config(name: str) -> dict[str, Any] | None:
    """The config.json of a released model such as 'deepseek-v3' or 'kimi-k2.5'; None for other names."""
    if name.lower() not in published():
        return None
    file = _CONFIGS / f"{SAME.get(name.lower(), name.lower())}.json"
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return raw


def unknown(model: str, error: FileNotFoundError) -> Exception:
    """The error, for a name with the published names that are like it. A path or an id of the hub is none,
    nor is a file of this machine that could not be opened."""
    if error.errno is not None or "/" in model or model.endswith(SUFFIX):
        return error
    return ValueError(f"{error}; {closest(model)}")


def closest(name: str) -> str:
    """A hint for an unknown name: the known names that are close, or all."""
    close = get_close_matches(name.lower(), published(), n=3, cutoff=0.75)
    family = next((prefix for prefix in _UNSUPPORTED if name.lower().startswith(prefix)), None)
    refused = f"{family} is not supported; " if family else ""
    return (
        f"{refused}published configurations{' like it' if close else ''}: {', '.join(close or published())}"
    )


def file_bytes(stored: Stored, shape: tuple[int, ...]) -> int:
    """Bytes of a parameter in a checkpoint's files, scales included."""
    count = prod(shape)
    if stored.is_float or len(shape) < 2:
        return count * (FLOAT_BYTES[stored.kind] if stored.is_float else 2)
    if stored.kind == "fp8":
        return count + 4 * prod(-(-n // FP8_BLOCK) for n in shape)
    if stored.kind == "int8":
        return count + 4 * shape[0]
    groups = shape[0] * -(-shape[1] // stored.group)
    return count // 2 + groups * (1 if stored.kind == "mxfp4" else 3 if stored.zero else 2)
