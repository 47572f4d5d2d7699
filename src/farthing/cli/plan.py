"""`farthing plan`: memory and estimated throughput of a deployment, before loading anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing import no_collection
from farthing.cli.exits import Exit, errors_as_one_line
from farthing.cli.options import with_options
from farthing.cli.plan_options import Planned, PlanOptions
from farthing.config import CPU_STEP_TOKENS, GPU_STEP_TOKENS

if TYPE_CHECKING:
    from farthing.model import ModelConfig
    from farthing.planner.devices import Ceilings
    from farthing.planner.footprint import StoredOf
    from farthing.planner.shard import Serving

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
    from farthing.cli.plan_cpu import print_cpu_estimate
    from farthing.cli.plan_estimate import print_estimate
    from farthing.planner.devices import load_devices

    with errors_as_one_line():
        with no_collection():  # most of the time is imports
            given = PlanOptions(**options)
            devices, shares = load_devices(given.ceilings)
            device = _device(given.gpu, devices)
            planned = _plan(given, device)
        if given.price is not None and device is not None:
            print_estimate(planned, device, shares, as_json)
            return
        if given.cores is not None:
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
    from farthing.checkpoint.quantization import method_of
    from farthing.options import parse_bytes
    from farthing.parallel.plan import ShardPlan
    from farthing.planner.footprint import FLOAT_BYTES, Holder, quantization_of
    from farthing.planner.memory import PlannedModel, memory

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
    holder = Holder(backend, item, options.quantization)
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
    from farthing.planner.shard import Serving

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
    from farthing.checkpoint import Checkpoint
    from farthing.checkpoint.reader import read_config
    from farthing.hub import resolve_config
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
        raise ValueError(f"model: got {model!r}, not a file; expected the path of a config.json")
    try:
        path = resolve_config(model)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; {closest(model)}") from None
    if not list(path.glob("*.safetensors*")):  # of a hub id
        raw = read_config(path)
        return ModelConfig.from_json(raw), stored_by_config(raw), raw
    checkpoint = Checkpoint.open(path)
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

    from farthing.cli.tables import size as _size

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
