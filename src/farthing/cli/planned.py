"""What `farthing plan` plans: its options, and the memory of the ranks that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from farthing.checkpoint.reader import Checkpoint, has_weights, method_of, read_config
from farthing.checkpoint.shards import read_json
from farthing.config import (
    CPU_STEP_TOKENS,
    GPU_STEP_TOKENS,
    Compute,
    Dtype,
    EngineConfig,
    ExpertsOn,
    Quantization,
    check,
    halves_of_rank,
    inherited,
    is_exact,
    option,
    parse_bytes,
)
from farthing.hub import resolve_config
from farthing.model import ModelConfig, config_of
from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.buffers import Serving
from farthing.planner.estimate import published_config, unknown
from farthing.planner.footprint import (
    FLOAT_BYTES,
    Holder,
    quantization_of,
    stored_by_checkpoint,
    stored_by_config,
)
from farthing.planner.memory import PlannedModel, cache_bytes_per_token, memory

if TYPE_CHECKING:
    from farthing.planner.footprint import StoredOf
    from farthing.planner.memory import RankMemory
    from farthing.planner.roofline import Ceilings

Backend = Literal["reference", "cpu", "gpu"]
KvCacheDtype = Literal["float32", "bfloat16", "fp8", "int8"]

_main = partial(option, group="Options")
_memory = partial(option, group="Memory")
_load = partial(option, group="Throughput (with --price)")
_cpu = partial(option, group="Throughput of a CPU server")
_served = partial(inherited, EngineConfig)  # as `farthing serve` declares them
_ranks = partial(_served, group="Options", default=None, flags=())


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The deployment to plan."""

    model: str = _main(
        "mite",
        "A directory, a hub id, `mite`, a config.json, or a published name such as kimi-k2.5",
        argument=True,
    )
    tp: int | None = _ranks("tensor_parallel_size")
    pp: int | None = _ranks("pipeline_parallel_size")
    ep: int | None = _ranks("expert_parallel_size")
    dp_attention: bool = _served("dp_attention", group="Options")
    dp: int = _main(1, "Number of replicas of this layout", minimum=1)
    memory: str | None = _main(None, "Memory limit per rank, such as 80GB; fail if exceeded")
    gpu: str | None = _main(None, "GPU whose memory and ceilings to use, such as h100")
    backend: Backend | None = _main(None, "Backend; default: gpu with --gpu, else cpu")
    dtype: Dtype = _served("dtype", group="Options")
    compute: Compute = _served("compute", group="Options")
    deterministic: bool = _served("deterministic", group="Options")

    quantization: Quantization | None = _served("quantization", group="Memory")
    kv_tokens: int | None = _memory(None, "KV cache size in tokens; default: max-model-len", minimum=1)
    kv_cache_dtype: KvCacheDtype = _served("kv_cache_dtype", group="Memory", default="bfloat16")
    max_model_len: int | None = _served(
        "max_model_len", group="Memory", help="Maximum tokens of prompt and output; default: the model's"
    )
    max_num_seqs: int | None = _served(
        "max_num_seqs",
        group="Memory",
        default=None,
        help="Maximum number of sequences per step; default: 64, with --price as many as fit",
    )
    max_num_batched_tokens: int | None = _served("max_num_batched_tokens", group="Memory")
    redundant_experts: int = _served("redundant_experts", group="Memory")
    experts_on: ExpertsOn | None = _served("experts_on", group="Memory")
    hot_experts: int = _served("hot_experts", group="Memory")

    price: float | None = _load(
        None, "Dollars per GPU-hour; estimates the given layout, or the smallest that fits", above=0
    )
    ceilings: Path | None = _load(None, "TOML file of measured ceilings")
    prefill_gpus: int | None = _load(
        None, "GPUs per prefill group, for separate groups as published by DeepSeek", minimum=1
    )
    decode_gpus: int | None = _load(None, "GPUs per decode group", minimum=1)
    prompt: int = _load(4383, "Tokens per prompt", minimum=1)
    output: int = _load(1210, "Tokens per answer", minimum=1)
    cache_hit: float | None = _load(
        None,
        "Prefix-cache hit rate of prompt tokens; default: 0.563, with --dp-attention 0",
        minimum=0,
        maximum=0.99,
    )
    user_rate: float = _load(21.0, "Minimum tokens/s per user", minimum=0.1)

    cores: int | None = _cpu(None, "Cores per socket; estimates one replica on all sockets", minimum=1)
    sockets: int = _cpu(1, "Sockets", minimum=1)
    socket_bandwidth: float | None = _cpu(
        None,
        "GB/s that a socket reads from its memory; default: measured, if this machine has these cores",
        minimum=1,
    )
    core_int8: float | None = _cpu(
        None, "INT8 GOP/s per core with all cores busy; default: measured on this machine", minimum=1
    )

    def __post_init__(self) -> None:
        check(self)
        layout = self.layout
        if self.experts_on and layout.world > 1:
            raise ValueError(f"experts-on: got {self.experts_on!r}; expected tp, pp and ep at 1 with it")
        if self.hot_experts and self.experts_on is None:
            raise ValueError(f"hot-experts: got {self.hot_experts}; expected 0 without --experts-on cpu")
        if self.price is not None and self.gpu is None:
            raise ValueError("price is set without a GPU; expected --gpu NAME")
        self._check_cores()
        if self.deterministic and (self.experts_on or self.backend in ("reference", "gpu") or self.gpu):
            raise ValueError("deterministic is set; expected backend cpu and no experts-on with it")
        if self.deterministic:
            halves_of_rank(layout.tp, layout.ep)
        if self.redundant_experts and self.price is None and layout.ep == 1:
            raise ValueError(f"redundant-experts: got {self.redundant_experts}; expected 0 unless --ep > 1")

    def _check_cores(self) -> None:
        if self.cores is None:
            options = [n for n in ("socket_bandwidth", "core_int8") if getattr(self, n) is not None]
            options += ["sockets"] if self.sockets > 1 else []
            if options:
                raise ValueError(f"{options[0].replace('_', '-')} is set without --cores; expected both")
        elif self.gpu or self.price is not None or self.layout.world > 1:
            raise ValueError("cores is set; expected no --gpu, --price, --tp, --pp and --ep with it")
        elif is_exact(self.compute, self.dtype):
            raise ValueError(
                f"compute: got {self.compute!r} with dtype {self.dtype!r} and --cores; expected int8, whose "
                "throughput is estimated"
            )

    @property
    def layout(self) -> Layout:
        """The layout given; what is not given is 1."""
        return Layout(self.tp or 1, self.pp or 1, self.ep or 1, self.dp_attention)


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of a layout, and whether it fits the limit in bytes per rank."""

    options: PlanOptions
    shards: ShardPlan
    model: PlannedModel
    holder: Holder
    serving: Serving
    stored: str  # quantization method of the checkpoint
    ranks: list[RankMemory]
    limit: int | None

    @property
    def fits(self) -> bool:
        """Whether every rank fits."""
        return self.limit is None or max(r.total for r in self.ranks) <= self.limit

    @property
    def alone(self) -> bool:
        """Whether one process serves the model, and no layout was asked for."""
        o = self.options
        return o.dp == len(self.ranks) == 1 and not any((o.tp, o.pp, o.ep))

    @property
    def room(self) -> int | None:
        """Additional cache tokens that fit on the fullest rank."""
        if self.limit is None or not self.fits:
            return None
        places = [self.shards.layout.place(r.rank) for r in self.ranks]
        return min(
            (self.limit - r.total) // cache_bytes_per_token(self.shards, place, self.serving)
            for r, place in zip(self.ranks, places, strict=True)
        )


USABLE_MEMORY = 0.9  # of a GPU


def plan_of(options: PlanOptions, device: Ceilings | None) -> Planned:
    """The plan of a model's files or configuration; device: the GPU whose memory is the limit.

    Raises ValueError for options that do not suit the model, naming them.
    """
    limit = int(device.memory * 1e9 * USABLE_MEMORY) if device else None
    if options.memory:
        limit = parse_bytes("memory", options.memory)
        if device and limit > device.memory * 1e9:
            raise ValueError(
                f"memory: got {options.memory!r}; expected at most the {device.memory:g}GB of {device.name}"
            )
    config, stored_of, raw = _read(options.model)
    backend = options.backend or ("gpu" if options.gpu else "cpu")
    item = 2 if options.dtype == "auto" and backend == "gpu" else FLOAT_BYTES.get(options.dtype, 4)
    halves = halves_of_rank(options.layout.tp, options.layout.ep) if options.deterministic else None
    holder = Holder(backend, item, options.quantization, halves)
    serving = _serving(options, backend, config)
    shards = ShardPlan.build(config, options.layout)
    model = PlannedModel.of(shards, stored_of)
    rounding = Holder("cpu", quantization=options.quantization) if options.experts_on else holder
    if options.quantization and not any(rounding.rounds(s) for n, s in model.matrices):
        kinds = ", ".join(sorted({s.kind for _, s in model.matrices}))
        raise ValueError(
            f"quantization: got {options.quantization!r} with backend {backend!r}, which does not round "
            f"{kinds} weights; expected no --quantization"
        )
    stored = method_of(quantization_of(raw))
    ranks = memory(model, shards, holder, serving)
    return Planned(options, shards, model, holder, serving, stored, ranks, limit)


def _serving(options: PlanOptions, backend: str, config: ModelConfig) -> Serving:
    longest = config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ValueError(
            f"max-model-len: got {options.max_model_len}; expected at most the model's {longest}"
        )
    length = options.max_model_len or longest
    return Serving(
        cache_tokens=options.kv_tokens or length,
        max_model_len=length,
        max_num_seqs=options.max_num_seqs or 64,
        max_num_batched_tokens=options.max_num_batched_tokens
        or (GPU_STEP_TOKENS if backend == "gpu" else CPU_STEP_TOKENS),
        cache_dtype=options.kv_cache_dtype,
        redundant_experts=options.redundant_experts,
        experts_on_host=options.experts_on == "cpu",
        hot_experts=options.hot_experts,
        exact=is_exact(options.compute, options.dtype),
    )


def device_of(gpu: str | None, devices: dict[str, Ceilings]) -> Ceilings | None:
    """The GPU of that name. Raises ValueError if there is none."""
    if gpu is None:
        return None
    if gpu.lower() not in devices:
        raise ValueError(f"gpu: got {gpu!r}; expected one of {', '.join(devices)}, or a row in --ceilings")
    return devices[gpu.lower()]


def _read(model: str) -> tuple[ModelConfig, StoredOf, dict[str, Any]]:
    """Read a checkpoint's headers or a bare config.json."""
    file = Path(model).expanduser()
    if file.is_dir() and (file / "config.json").is_file() and not has_weights(file):
        file = file / "config.json"
    if file.is_file() and file.suffix != ".gguf":
        raw = read_json(file)
        return ModelConfig.from_json(raw), stored_by_config(raw), raw
    if not file.exists() and (published := published_config(model)) is not None:
        return ModelConfig.from_json(published), stored_by_config(published), published
    if file.suffix == ".json":
        raise ValueError(f"model: got {model!r}, not a file; expected the path of a config.json")
    try:
        path = resolve_config(model)
    except FileNotFoundError as error:
        raise unknown(model, error) from None
    if not has_weights(path):  # of a hub id
        raw = read_config(path)
        return ModelConfig.from_json(raw), stored_by_config(raw), raw
    checkpoint = Checkpoint.open(path)
    return config_of(checkpoint), stored_by_checkpoint(checkpoint.path), checkpoint.config
