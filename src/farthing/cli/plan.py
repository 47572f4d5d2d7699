"""`farthing plan`: memory, throughput and price of a deployment, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from farthing import no_collection
from farthing.checkpoint.reader import Checkpoint, has_weights, method_of, read_config
from farthing.cli.errors import Exit, errors_as_one_line, with_options
from farthing.cli.tables import size
from farthing.cli.tables import size as _size
from farthing.config import (
    CPU_STEP_TOKENS,
    GPU_STEP_TOKENS,
    Dtype,
    EngineConfig,
    ExpertsOn,
    Quantization,
    check,
    halves_of_rank,
    inherited,
    option,
    parse_bytes,
)
from farthing.cpus import own_cpus
from farthing.hub import BUNDLED, resolve_config
from farthing.model import ModelConfig, config_of
from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.buffers import Serving
from farthing.planner.estimate import (
    BANDWIDTH,
    INT8,
    Machine,
    Target,
    closest,
    estimate,
    groups,
    published_config,
    serving,
    smallest,
)
from farthing.planner.footprint import (
    FLOAT_BYTES,
    Holder,
    quantization_of,
    stored_by_checkpoint,
    stored_by_config,
)
from farthing.planner.memory import (
    PlannedModel,
    cache_bytes_per_token,
    fitting_layouts,
    memory,
    most_hot_experts,
    smaller_options,
)
from farthing.planner.roofline import Workload, load_devices

if TYPE_CHECKING:
    from farthing.planner.estimate import CpuEstimate, Estimate
    from farthing.planner.footprint import StoredOf
    from farthing.planner.memory import RankMemory
    from farthing.planner.roofline import Ceilings, Efficiency


# The part of `farthing plan` that needs a price: throughput and dollars per million tokens.

CACHE_HIT = 0.563  # of prompt tokens, as published by DeepSeek


def print_estimate(planned: Planned, device: Ceilings, shares: Efficiency, as_json: bool) -> None:
    """Print an estimate of the deployment that the options describe. Raises ValueError if there is none."""
    e = _estimate(planned, device, shares)
    if as_json:
        document: dict[str, Any] = {
            "kind": "estimate",
            "stored": planned.stored,
            "serve": _command(planned, e),
        }
        document |= {"replicas": planned.options.dp, "device": asdict(device), "shares": asdict(shares)}
        memory = asdict(e.memory) | {"total": e.memory.total}
        print(json.dumps(document | asdict(e) | {"memory": memory}))
        return
    _print_estimate(planned, e, device)


def _estimate(planned: Planned, device: Ceilings, shares: Efficiency) -> Estimate:

    o = planned.options
    _check(planned)
    load = replace(planned.serving, cache_tokens=o.kv_tokens or 0)
    limit = planned.limit or 0
    target = Target(planned.model, planned.holder, load, limit, device, shares, o.max_num_seqs)
    hit = CACHE_HIT if o.cache_hit is None and not o.dp_attention else o.cache_hit or 0.0
    workload = Workload(o.prompt, o.output, hit, 1 / o.user_rate)
    price = o.price or 0.0
    if o.prefill_gpus and o.decode_gpus:
        return groups(target, o.prefill_gpus, o.decode_gpus, workload, price)
    if any((o.tp, o.pp, o.ep)):
        return serving(target, o.layout, workload, price)
    allowed = not o.cache_hit and not o.redundant_experts
    return smallest(target, workload, price, replace(workload, cache_hit=0.0) if allowed else None)


def _check(planned: Planned) -> None:
    """Refuse options that the estimate cannot honour."""
    o, backend = planned.options, planned.holder.backend
    separate = (o.prefill_gpus, o.decode_gpus)
    sharded = any((o.tp, o.pp, o.ep))
    if backend != "gpu":
        raise ValueError(f"backend: got {backend!r}; expected 'gpu' with --price: ceilings are those of GPUs")
    if o.dtype not in ("auto", "bfloat16"):
        raise ValueError(f"dtype: got {o.dtype!r}; expected auto or bfloat16 with --price")
    if o.experts_on:
        raise ValueError(f"experts-on: got {o.experts_on!r}; expected none with --price")
    if any(separate) and not all(separate):
        missing = "decode-gpus" if o.prefill_gpus else "prefill-gpus"
        raise ValueError(f"{missing} is not set; expected both --prefill-gpus and --decode-gpus, or neither")
    if any(separate) and (sharded or o.dp_attention):
        raise ValueError("prefill-gpus is set with a layout; expected no --tp, --pp, --ep, --dp-attention")
    if o.dp_attention and (o.cache_hit or o.redundant_experts):
        raise ValueError(
            "dp-attention is set; expected --cache-hit 0 and --redundant-experts 0: `farthing serve "
            "--dp-attention` has neither a prefix cache nor copies of experts"
        )
    experts = planned.model.config.n_routed_experts or 0
    if o.redundant_experts and sharded and (o.layout.ep == 1 or o.redundant_experts % o.layout.ep):
        raise ValueError(
            f"redundant-experts: got {o.redundant_experts}; expected 0, or a multiple of ep with --ep above 1"
        )
    if o.redundant_experts > experts:
        raise ValueError(f"redundant-experts: got {o.redundant_experts}; expected at most {experts}")
    length = planned.serving.max_model_len
    if o.prompt + o.output > length:
        raise ValueError(
            f"prompt and output: got {o.prompt} and {o.output}; expected at most {length} tokens together"
        )


def _command(planned: Planned, e: Estimate) -> str | None:
    """The command that serves the deployment; None for separate groups."""
    o, layout = planned.options, e.layout
    if layout is None:
        return None
    # Others are configurations only.
    servable = o.model in BUNDLED or "/" in o.model or Path(o.model).exists()
    words = [f"farthing serve {o.model if servable else 'MODEL'} --backend gpu"]
    words += [f"--{n} {getattr(layout, n)}" for n in ("tp", "pp", "ep") if getattr(layout, n) > 1]
    words += ["--dp-attention --no-enable-prefix-caching"] if layout.dp_attention else []
    words += [f"--quantization {o.quantization}"] if o.quantization else []
    words += [f"--kv-cache-dtype {o.kv_cache_dtype}", f"--max-num-seqs {e.decode.tokens_per_step}"]
    words += [f"--max-model-len {o.max_model_len}"] if o.max_model_len else []
    words += [f"--max-num-batched-tokens {o.max_num_batched_tokens}"] if o.max_num_batched_tokens else []
    if o.memory or o.kv_tokens:  # otherwise the server fills a GPU's memory by itself
        words += [f"--num-blocks {e.cache_tokens // planned.serving.block_size}"]
    copies = o.redundant_experts
    return " ".join(words + ([f"--redundant-experts {copies} --rebalance-steps 1000"] if copies else []))


def _print_estimate(planned: Planned, e: Estimate, device: Ceilings) -> None:
    from rich.console import Console
    from rich.table import Table

    o, m = planned.options, e.memory
    table = Table(
        "ESTIMATE, not measured",
        "prefill",
        "decode",
        title=f"{o.model} on {device.name}, ${o.price:g} per GPU-hour",
    )
    table.add_row("GPUs" if e.layout else "GPUs per group", str(e.prefill.gpus), str(e.decode.gpus))
    table.add_row("tokens per step", f"{e.prefill.tokens_per_step:,}", f"{e.decode.tokens_per_step:,}")
    table.add_row(
        "tokens/s per GPU", f"{e.prefill.tokens_per_second:,.0f}", f"{e.decode.tokens_per_second:,.0f}"
    )
    table.add_row("  including cache hits", f"{e.prefill_with_hits:,.0f}", "")
    table.add_row("bound by", e.prefill.bound, e.decode.bound)
    table.add_row("dollars per million tokens", f"{e.usd_input:.3f} input", f"{e.usd_output:.3f} output")
    table.add_row("  including prompts", "", f"{e.usd_request_output:.3f} output")
    console = Console()
    console.print(table)
    console.print(
        f"memory per GPU: weights {size(m.weights)} ({planned.stored}), cache {size(m.cache)} "
        f"({e.cache_tokens:,} tokens, {o.kv_cache_dtype}), buffers {size(m.buffers)}, total {size(m.total)} "
        f"of {size(e.limit)} usable",
        highlight=False,
    )
    if o.dp > 1:
        gpus = o.dp * e.decode.gpus
        console.print(
            f"{o.dp} replicas: {gpus} GPUs, ${gpus * (o.price or 0):,.2f} per hour", highlight=False
        )
    if command := _command(planned, e):
        heading = "" if any((o.tp, o.pp, o.ep)) else "smallest deployment that fits: "
        console.print(heading + command, highlight=False, soft_wrap=True)
    console.print("Assumed:")
    for line in e.assumptions:
        console.print(f"- {line}", highlight=False)


# What `farthing plan` plans: its options, and the resulting plan.

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
    def room(self) -> int | None:
        """Additional cache tokens that fit on the fullest rank."""

        if self.limit is None or not self.fits:
            return None
        places = [self.shards.layout.place(r.rank) for r in self.ranks]
        return min(
            (self.limit - r.total) // cache_bytes_per_token(self.shards, place, self.serving)
            for r, place in zip(self.ranks, places, strict=True)
        )


# The part of `farthing plan` that needs --cores: throughput of a CPU server.

PROBE = 1 << 28  # bytes


def print_cpu_estimate(planned: Planned, as_json: bool) -> None:
    """Print an estimate for the server that the options describe. Raises ValueError if there is none."""

    o = planned.options
    if planned.holder.backend != "cpu":
        raise ValueError(f"backend: got {planned.holder.backend!r}; expected cpu with --cores")
    if o.prompt + o.output > planned.serving.max_model_len:
        raise ValueError(
            f"prompt and output: got {o.prompt} and {o.output}; expected at most "
            f"{planned.serving.max_model_len} tokens together"
        )
    machine, sources = _machine(planned)
    speeds = estimate(planned.model, planned.holder, machine, Workload(o.prompt, o.output), o.kv_cache_dtype)
    if as_json:
        document = {"kind": "estimate", "stored": planned.stored, "machine": asdict(machine)}
        print(json.dumps(document | {"sources": sources} | asdict(speeds)))
    else:
        _print_cpu(planned, machine, sources, speeds)


def _machine(planned: Planned) -> tuple[Machine, dict[str, str]]:
    """The server, and where its figures come from."""

    o = planned.options
    assert o.cores is not None
    bandwidth, core, sources = o.socket_bandwidth, o.core_int8, {"bandwidth": "given", "int8": "given"}
    if bandwidth is None or core is None:
        here, together, measured_core = _measure()
        how = f"measured on this machine with {here} threads"
        if bandwidth is None:
            if o.sockets * o.cores != here:
                raise ValueError(
                    f"socket-bandwidth: got None with {o.sockets} x {o.cores} cores; expected the GB/s of a "
                    f"socket, because this machine ({here} cores) can only measure its own"
                )
            bandwidth, sources["bandwidth"] = together / o.sockets, how
        if core is None:
            core, sources["int8"] = measured_core, how
    return Machine(o.sockets, o.cores, bandwidth, core), sources


def _measure() -> tuple[int, float, float]:
    """Threads that would serve here; GB/s that they read; INT8 GOP/s of each with all busy."""

    try:
        from farthing import _native
    except ImportError:
        raise ValueError(
            "the CPU kernels are not built, so nothing can be measured; expected --socket-bandwidth and "
            "--core-int8"
        ) from None
    cpus = own_cpus().threads()
    peak = max(_native.peak_ops(kind, cpus) for kind in ("vnni_int8", "amx_int8"))
    return cpus, _native.read_bandwidth(cpus, PROBE), peak / cpus


def _print_cpu(planned: Planned, machine: Machine, sources: dict[str, str], speeds: CpuEstimate) -> None:
    from rich.console import Console
    from rich.table import Table

    o, rank = planned.options, planned.ranks[0]
    low, high = (f"{share:.0%}" for share in BANDWIDTH)
    table = Table(
        "ESTIMATE, not measured", "GB per step", "tok/s, limit", f"at {low} to {high} of it",
        title=f"{o.model} on {machine.sockets} x {machine.cores} cores",
    )  # fmt: skip
    for s in speeds.steps:
        table.add_row(
            f"decode, batch {s.batch}",
            f"{s.gigabytes:.1f}",
            f"{s.limit:,.1f}",
            f"{s.low:,.1f} to {s.high:,.1f}",
        )
    table.add_row("prefill", "", f"{speeds.prefill_limit:,.0f}", f"{speeds.prefill:,.0f} at {INT8:.0%}")
    console = Console()
    console.print(table)
    each, slower = speeds.joins / 1000, speeds.joins * speeds.steps[0].high * 1e-6
    for line in (
        f"memory: weights {size(rank.weights)}, buffers {size(rank.buffers)}, and the cache",
        f"bandwidth: {machine.sockets} x {machine.bandwidth:.0f} GB/s, {sources['bandwidth']}",
        f"INT8: {machine.int8:.0f} GOP/s per core, {sources['int8']}",
        "extrapolated: sockets and cores add up; shares of the ceilings are those of two cores",
        f"not counted: waiting for other threads, {speeds.joins:,} times per step; each microsecond of it "
        f"adds {each:.1f} ms, {slower:.0%} at batch 1",
        f"prompts of {o.prompt:,} tokens, {o.output:,} output tokens, {o.kv_cache_dtype} cache; random "
        "routing",
    ):
        console.print(f"- {line}", highlight=False, soft_wrap=True)


app = typer.Typer(add_completion=False)

EPILOG = """
Examples:

  farthing plan --tp 2 --pp 2

  farthing plan ./DeepSeek-V3 --tp 8 --ep 16 --gpu h100

  farthing plan deepseek-v3 --gpu h100 --price 2.0

  farthing plan deepseek-v3 --quantization int4 --sockets 2 --cores 64 --socket-bandwidth 300

  farthing plan kimi-k2.5 --gpu h200 --price 3.5 --tp 8 --kv-cache-dtype fp8

  farthing plan deepseek-v3 --gpu h800 --price 2.0 --prefill-gpus 32 --decode-gpus 144 --redundant-experts 32
"""
USABLE_MEMORY = 0.9  # of a GPU


@app.command(epilog=EPILOG)
@with_options(options=PlanOptions)
def plan(
    options: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Memory per rank and, with a price, an estimate of throughput and dollars per million tokens.

    Exit codes: 0 done; 1 unexpected error; 2 invalid input; 5 read failed; 6 the memory is too small (with
    --price, 2).
    """

    with errors_as_one_line():
        with no_collection():  # most of the time is imports
            o = PlanOptions(**options)
            devices, shares = load_devices(o.ceilings)
            device = _device(o.gpu, devices)
            planned = _plan(o, device)
        if o.price is not None and device is not None:
            print_estimate(planned, device, shares, as_json)
            return
        if o.cores is not None:
            print_cpu_estimate(planned, as_json)
            return
    advice = "" if planned.fits else _advice(planned)
    if as_json:
        print(json.dumps(_document(planned, advice)))
    else:
        _print_ranks(planned)
    if advice:
        typer.echo(f"error: {advice}", err=True)
        raise typer.Exit(Exit.MISFIT)


def _plan(options: PlanOptions, device: Ceilings | None) -> Planned:

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
    halves = halves_of_rank(options.layout.tp, options.layout.ep) if options.deterministic else 1
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
    )


def _device(gpu: str | None, devices: dict[str, Ceilings]) -> Ceilings | None:
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
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        return ModelConfig.from_json(raw), stored_by_config(raw), raw
    if not file.exists() and (raw := published_config(model)) is not None:
        return ModelConfig.from_json(raw), stored_by_config(raw), raw
    if file.suffix == ".json":
        raise ValueError(f"model: got {model!r}, not a file; expected the path of a config.json")
    try:
        path = resolve_config(model)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; {closest(model)}") from None
    if not has_weights(path):  # of a hub id
        raw = read_config(path)
        return ModelConfig.from_json(raw), stored_by_config(raw), raw
    checkpoint = Checkpoint.open(path)
    return config_of(checkpoint), stored_by_checkpoint(checkpoint.path), checkpoint.config


def _advice(planned: Planned) -> str:

    limit = planned.limit or 0
    sizing = (planned.model, planned.holder, planned.serving, limit)
    layout = next(fitting_layouts(*sizing), None)
    if layout is None and (hot := most_hot_experts(*sizing)) is not None:
        return (
            f"{planned.serving.hot_experts} hot experts per layer exceed {limit / 1e9:.1f} GB; "
            f"--hot-experts {hot} would fit"
        )
    options = smaller_options(*sizing)
    if layout is None:
        fits = f"{options} would fit" if options else "use --quantization, fewer cache tokens, or more memory"
        return f"no layout of up to 64 ranks fits {limit / 1e9:.1f} GB per rank; {fits}"
    alone = f", as would {options} on one" if options else ""
    return (
        f"the largest rank exceeds {limit / 1e9:.1f} GB; "
        f"--tp {layout.tp} --pp {layout.pp} --ep {layout.ep} ({layout.world} ranks) would fit{alone}"
    )


def _document(planned: Planned, advice: str) -> dict[str, Any]:
    layout, dp = planned.shards.layout, planned.options.dp
    return {
        "layout": asdict(layout) | {"dp": dp, "ranks": layout.world * dp},
        "backend": planned.holder.backend,
        "stored": planned.stored,
        "serving": asdict(planned.serving),
        "ranks": [asdict(r) | {"total": r.total} for r in planned.ranks],
        "limit": planned.limit,
        "fits": planned.fits,
        "more_cache_tokens": planned.room,
        "advice": advice,
    }


def _print_ranks(planned: Planned) -> None:
    from rich.console import Console
    from rich.table import Table

    ranks, dp, limit, room = planned.ranks, planned.options.dp, planned.limit, planned.room
    title = f"{planned.options.model}: planned memory of {len(ranks)} rank{'s' * (len(ranks) > 1)}" + (
        f", {dp} replicas" if dp > 1 else ""
    )
    table = Table("rank", "layers", "experts", "weights", "cache", "buffers", "total", title=title)
    for r in ranks:
        numbers = (_size(n) for n in (r.weights, r.cache, r.buffers, r.total))
        table.add_row(str(r.rank), f"{r.layers[0]}–{r.layers[1] - 1}", str(r.experts), *numbers)
    Console().print(table)
    if host := sum(r.host for r in ranks):
        Console().print(f"host memory for routed experts: {_size(host)}")
    if limit is not None:
        Console().print(
            f"limit {_size(limit)} per rank" + (f"; room for {room:,} more cache tokens" if room else "")
        )
