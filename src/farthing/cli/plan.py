"""`farthing plan`: memory and estimated throughput of a deployment, before loading anything."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from farthing.cli.options import with_options
from farthing.config import CPU_STEP_TOKENS, GPU_STEP_TOKENS, Dtype, ExpertsOn, Quantization
from farthing.options import check, option

if TYPE_CHECKING:
    from farthing.model import ModelConfig
    from farthing.parallel.plan import ShardPlan
    from farthing.planner.estimate import Ceilings, Shares
    from farthing.planner.footprint import Holder, StoredOf
    from farthing.planner.memory import PlannedModel, RankMemory
    from farthing.planner.shard import Serving

app = typer.Typer(add_completion=False)

EPILOG = """
Examples:

  farthing plan --tp 2 --pp 2

  farthing plan ./DeepSeek-V3 --tp 8 --ep 16 --gpu h100

  farthing plan deepseek-v3 --gpu h100 --price 2.0
"""
Backend = Literal["reference", "cpu", "gpu"]
KvCacheDtype = Literal["float32", "bfloat16", "fp8", "int8"]

_main = partial(option, group="Options")
_memory = partial(option, group="Memory")
_load = partial(option, group="Throughput (with --price)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The deployment to plan."""

    model: str = _main(
        "mite",
        "A directory, a hub id, `mite`, a config.json, or a published name such as kimi-k2.5",
        argument=True,
    )
    tp: int = _main(1, "Tensor-parallel ranks (heads, dense MLPs, shared experts)")
    pp: int = _main(1, "Number of pipeline stages")
    ep: int = _main(1, "Expert-parallel ranks (routed experts)")
    dp: int = _main(1, "Number of replicas of this layout", minimum=1)
    memory: str | None = _main(None, "Memory limit per rank, such as 80GB; fail if exceeded")
    gpu: str | None = _main(None, "GPU whose memory and ceilings to use, such as h100")
    backend: Backend | None = _main(None, "Backend; default: gpu with --gpu, else cpu")
    dtype: Dtype = _main("auto", "Activation dtype")

    quantization: Quantization | None = _memory(None, "Format to round dense weights to (cpu)")
    kv_tokens: int | None = _memory(None, "KV cache size in tokens; default: max-model-len", minimum=1)
    kv_cache_dtype: KvCacheDtype = _memory("bfloat16", "KV cache dtype")
    max_model_len: int | None = _memory(None, "Context length; default: the model's", minimum=1)
    max_num_seqs: int = _memory(64, "Maximum sequences per step", minimum=1)
    max_num_batched_tokens: int | None = _memory(
        None, "Token budget per step; default: 512, on a GPU 8192", minimum=1
    )
    redundant_experts: int = _memory(0, "Redundant expert copies per layer", minimum=0)
    experts_on: ExpertsOn | None = _memory(None, "cpu: keep routed experts in host memory")
    hot_experts: int = _memory(0, "Experts per layer to keep on the GPU with --experts-on cpu", minimum=0)

    price: float | None = _load(None, "Dollars per GPU-hour; enables the estimate", minimum=0)
    ceilings: Path | None = _load(None, "TOML file of measured ceilings")
    prefill_gpus: int = _load(32, "GPUs per prefill group", minimum=1)
    decode_gpus: int = _load(144, "GPUs per decode group", minimum=1)
    prompt: int = _load(4383, "Tokens per prompt", minimum=1)
    output: int = _load(1210, "Tokens per answer", minimum=1)
    cache_hit: float = _load(0.563, "Prefix-cache hit rate of prompt tokens", minimum=0, maximum=0.99)
    user_rate: float = _load(21.0, "Minimum tokens/s per user", minimum=0.1)

    def __post_init__(self) -> None:
        check(self)
        if self.experts_on and max(self.tp, self.ep) * self.pp > 1:
            raise ValueError(f"experts-on is {self.experts_on!r}; expected tp, pp and ep at 1 with it")
        if self.hot_experts and self.experts_on is None:
            raise ValueError(f"hot-experts is {self.hot_experts}; expected 0 without --experts-on cpu")
        if self.price is not None and self.gpu is None:
            raise ValueError("price is set without a GPU; expected --gpu NAME")


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
        from farthing.planner.memory import cache_bytes_per_token

        if self.limit is None or not self.fits:
            return None
        places = [self.shards.layout.place(r.rank) for r in self.ranks]
        return min(
            (self.limit - r.total) // cache_bytes_per_token(self.shards, place, self.serving.cache_dtype)
            for r, place in zip(self.ranks, places, strict=True)
        )


@app.command(epilog=EPILOG)
@with_options(options=PlanOptions)
def plan(
    options: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Memory per rank and, with a price, an estimate of throughput and dollars per million tokens."""
    from farthing.planner.estimate import load_devices

    try:
        given = PlanOptions(**options)
        devices, shares = load_devices(given.ceilings)
        device = _device(given.gpu, devices)
        if given.price is not None and device is not None:
            _print_estimate(given, device, shares, as_json)
            return
        planned = _plan(given, device)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    advice = "" if planned.fits else _advice(planned)
    if as_json:
        print(json.dumps(_document(planned, advice)))
    else:
        _print_ranks(planned)
    if advice:
        typer.echo(f"error: {advice}", err=True)
        raise typer.Exit(1)


def _plan(options: PlanOptions, device: Ceilings | None) -> Planned:
    from farthing.compress.size import parse_bytes
    from farthing.parallel.plan import Layout, ShardPlan
    from farthing.planner.footprint import FLOAT_BYTES, Holder
    from farthing.planner.memory import PlannedModel, memory

    limit = int(device.memory * 1e9 * 0.9) if device else None
    if options.memory:
        limit = parse_bytes("memory", options.memory)
    config, stored_of, raw = _read(options.model)
    backend = options.backend or ("gpu" if options.gpu else "cpu")
    item = 2 if options.dtype == "auto" and backend == "gpu" else FLOAT_BYTES.get(options.dtype, 4)
    holder = Holder(backend, item, options.quantization)
    serving = _serving(options, backend, config)
    shards = ShardPlan.build(config, Layout(options.tp, options.pp, options.ep))
    model = PlannedModel.of(shards, stored_of)
    stored = raw.get("quantization_config", {}).get("quant_method", "dense")
    ranks = memory(model, shards, holder, serving)
    return Planned(options, shards, model, holder, serving, stored, ranks, limit)


def _serving(options: PlanOptions, backend: str, config: ModelConfig) -> Serving:
    from farthing.planner.shard import Serving

    length = min(options.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
    return Serving(
        cache_tokens=options.kv_tokens or length,
        max_model_len=length,
        max_num_seqs=options.max_num_seqs,
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
        raise ValueError(f"gpu is {gpu!r}; expected one of {', '.join(devices)}, or a row in --ceilings")
    return devices[gpu.lower()]


def _read(model: str) -> tuple[ModelConfig, StoredOf, dict[str, Any]]:
    """Read a checkpoint's headers or a bare config.json."""
    from farthing.checkpoint import Checkpoint
    from farthing.hub import resolve_model
    from farthing.model import ModelConfig
    from farthing.model.load import config_of
    from farthing.planner.footprint import stored_by_checkpoint, stored_by_config
    from farthing.planner.published import closest, published_config

    file = Path(model).expanduser()
    if file.is_dir() and (file / "config.json").is_file() and not list(file.glob("*.safetensors*")):
        file = file / "config.json"
    if file.is_file():
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        return ModelConfig.from_json(raw), stored_by_config(raw), raw
    if not file.exists() and (raw := published_config(model)) is not None:
        return ModelConfig.from_json(raw), stored_by_config(raw), raw
    if file.suffix == ".json":
        raise ValueError(f"model is {model!r}, not a file; expected the path of a config.json")
    try:
        checkpoint = Checkpoint.open(resolve_model(model))
    except FileNotFoundError as error:
        raise ValueError(f"{error}; {closest(model)}") from None
    return config_of(checkpoint), stored_by_checkpoint(checkpoint.path), checkpoint.config


def _advice(planned: Planned) -> str:
    from farthing.planner.memory import fitting_layouts, most_hot_experts

    limit = planned.limit or 0
    sizing = (planned.model, planned.holder, planned.serving, limit)
    found = next(fitting_layouts(*sizing), None)
    if found is None and (hot := most_hot_experts(*sizing)) is not None:
        return (
            f"{planned.serving.hot_experts} hot experts per layer exceed {limit / 1e9:.1f} GB; "
            f"--hot-experts {hot} would fit"
        )
    if found is None:
        return (
            f"no layout of up to 64 ranks fits {limit / 1e9:.1f} GB per rank; "
            "use fewer cache tokens or more memory"
        )
    return (
        f"the largest rank exceeds {limit / 1e9:.1f} GB; "
        f"--tp {found.tp} --pp {found.pp} --ep {found.ep} ({found.world} ranks) would fit"
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


def _print_estimate(options: PlanOptions, device: Ceilings, shares: Shares, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from farthing.planner.estimate import Workload, estimate

    config, _, _ = _read(options.model)
    workload = Workload(options.prompt, options.output, options.cache_hit, 1 / options.user_rate)
    price = options.price or 0.0
    e = estimate(config, device, shares, workload, price, options.prefill_gpus, options.decode_gpus)
    if as_json:
        print(
            json.dumps({"kind": "estimate", "device": asdict(device), "shares": asdict(shares)} | asdict(e))
        )
        return
    title = f"{options.model} on {device.name}, ${price:g} per GPU-hour"
    table = Table("ESTIMATE, not measured", "prefill", "decode", title=title)
    table.add_row("GPUs per group", str(e.prefill.gpus), str(e.decode.gpus))
    table.add_row(
        "tokens/s per GPU", f"{e.prefill.tokens_per_second:,.0f}", f"{e.decode.tokens_per_second:,.0f}"
    )
    table.add_row("tokens/s per node of 8", f"{e.prefill.node():,.0f}", f"{e.decode.node():,.0f}")
    table.add_row("  including cache hits", f"{e.prefill_with_hits * 8:,.0f}", "")
    table.add_row("bound by", e.prefill.bound, e.decode.bound)
    table.add_row("dollars per million tokens", f"{e.usd_input:.3f} input", f"{e.usd_output:.3f} output")
    table.add_row("  including prompts", "", f"{e.usd_request_output:.3f} output")
    console = Console()
    console.print(table)
    console.print("Assumed:")
    for line in e.assumptions:
        console.print(f"- {line}", highlight=False)


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
