"""`farthing plan`: memory and estimated throughput of a deployment, before loading anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from farthing.model import ModelConfig
    from farthing.planner.estimate import Ceilings, Estimate, Shares
    from farthing.planner.footprint import StoredOf
    from farthing.planner.memory import RankMemory

app = typer.Typer()

EPILOG = """
Examples:

  farthing plan --tp 2 --pp 2

  farthing plan ./DeepSeek-V3 --tp 8 --ep 16 --gpu h100

  farthing plan deepseek-v3 --gpu h100 --price 2.0
"""
_MEMORY, _LOAD = "Memory", "Throughput (with --price)"


@app.command(epilog=EPILOG)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory, a hub id, `mite`, a config.json, or a published name such as kimi-k2.5."
        ),
    ] = "mite",
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks (heads, dense MLPs, shared experts).")] = 1,
    pp: Annotated[int, typer.Option(help="Number of pipeline stages.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel ranks (routed experts).")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Number of replicas of this layout.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Memory limit per rank, such as 80GB; fail if exceeded.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU whose memory and ceilings to use, such as h100.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="reference, cpu or gpu. Default: gpu with --gpu, else cpu.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Activation dtype: float32 or bfloat16.")] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(help="Quantize dense weights to int8 or int4 (cpu).", rich_help_panel=_MEMORY),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="KV cache size in tokens. Default: max-model-len.", rich_help_panel=_MEMORY),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="KV cache dtype: float32, bfloat16, fp8 or int8.", rich_help_panel=_MEMORY)
    ] = "bfloat16",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Context length. Default: the model's.", rich_help_panel=_MEMORY)
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Maximum sequences per step.", rich_help_panel=_MEMORY)
    ] = 64,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Token budget per step. Default: 512; gpu 8192.", rich_help_panel=_MEMORY),
    ] = None,
    redundant_experts: Annotated[
        int, typer.Option(min=0, help="Redundant expert copies per layer.", rich_help_panel=_MEMORY)
    ] = 0,
    experts_on: Annotated[
        str | None,
        typer.Option(help="cpu: keep routed experts in host memory.", rich_help_panel=_MEMORY),
    ] = None,
    hot_experts: Annotated[
        int,
        typer.Option(
            min=0, help="Experts per layer to keep on the GPU with --experts-on cpu.", rich_help_panel=_MEMORY
        ),
    ] = 0,
    price: Annotated[
        float | None,
        typer.Option(min=0, help="Dollars per GPU-hour; enables the estimate.", rich_help_panel=_LOAD),
    ] = None,
    ceilings: Annotated[
        Path | None, typer.Option(help="TOML file of measured ceilings.", rich_help_panel=_LOAD)
    ] = None,
    prefill_gpus: Annotated[
        int, typer.Option(min=1, help="GPUs per prefill group.", rich_help_panel=_LOAD)
    ] = 32,
    decode_gpus: Annotated[
        int, typer.Option(min=1, help="GPUs per decode group.", rich_help_panel=_LOAD)
    ] = 144,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens per prompt.", rich_help_panel=_LOAD)] = 4383,
    output: Annotated[int, typer.Option(min=1, help="Tokens per answer.", rich_help_panel=_LOAD)] = 1210,
    cache_hit: Annotated[
        float,
        typer.Option(min=0, max=0.99, help="Prefix-cache hit rate of prompt tokens.", rich_help_panel=_LOAD),
    ] = 0.563,
    user_rate: Annotated[
        float, typer.Option(min=0.1, help="Minimum tokens/s per user.", rich_help_panel=_LOAD)
    ] = 21.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Memory per rank and, with a price, an estimate of throughput and dollars per million tokens."""
    from farthing.compress.size import parse_bytes
    from farthing.parallel.plan import Layout, ShardPlan
    from farthing.planner.buffers import Serving
    from farthing.planner.estimate import Workload, estimate, load_devices
    from farthing.planner.memory import Model
    from farthing.planner.memory import memory as ranks_of

    try:
        devices, shares = load_devices(ceilings)
        device = _device(gpu, devices)
        limit = (
            parse_bytes("memory", memory) if memory else int(device.memory * 1e9 * 0.9) if device else None
        )
        config, stored_of, raw = _read(model)
        holder = _holder(backend or ("gpu" if gpu else "cpu"), dtype, quantization)
        length = min(max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        batched = max_num_batched_tokens or (8192 if holder.backend == "gpu" else 512)
        if kv_cache_dtype not in ("float32", "bfloat16", "fp8", "int8"):
            raise ValueError(f"kv-cache-dtype is {kv_cache_dtype!r}; expected float32, bfloat16, fp8 or int8")
        if experts_on not in (None, "cpu") or (experts_on and max(tp, ep) * pp > 1):
            raise ValueError(f"experts-on is {experts_on!r}; expected cpu, with tp, pp and ep at 1")
        if hot_experts and experts_on is None:
            raise ValueError(f"hot-experts is {hot_experts}; expected 0 without --experts-on cpu")
        serving = Serving(
            kv_tokens or length, length, max_num_seqs, batched, kv_cache_dtype,
            redundant_experts=redundant_experts, experts_on_host=experts_on == "cpu", hot_experts=hot_experts,
        )  # fmt: skip
        if price is not None:
            if device is None:
                raise ValueError("price is set without a GPU; expected --gpu NAME")
            workload = Workload(prompt, output, cache_hit, 1 / user_rate)
            result = estimate(config, device, shares, workload, price, prefill_gpus, decode_gpus)
            _print_estimate(model, device, shares, price, result, as_json)
            return
        layout = Layout(tp, pp, ep)
        shard_plan = ShardPlan.build(config, layout)
        parts = Model.of(shard_plan, stored_of)
        ranks = ranks_of(parts, shard_plan, holder, serving)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    fits = limit is None or max(r.total for r in ranks) <= limit
    advice = "" if fits else _advice(parts, holder, serving, limit or 0)
    room = None if limit is None or not fits else _more_tokens(shard_plan, ranks, serving.cache_dtype, limit)
    if as_json:
        document = {
            "layout": asdict(layout) | {"dp": dp, "ranks": layout.world * dp},
            "backend": holder.backend,
            "stored": raw.get("quantization_config", {}).get("quant_method", "dense"),
            "serving": asdict(serving),
            "ranks": [asdict(r) | {"total": r.total} for r in ranks],
            "limit": limit,
            "fits": fits,
            "more_cache_tokens": room,
            "advice": advice,
        }
        print(json.dumps(document))
    else:
        _print_ranks(model, ranks, dp, limit, room)
    if not fits:
        typer.echo(f"error: {advice}", err=True)
        raise typer.Exit(1)


def _device(gpu: str | None, devices: dict[str, Ceilings]) -> Ceilings | None:
    if gpu is None:
        return None
    if gpu.lower() not in devices:
        raise ValueError(f"gpu is {gpu!r}; expected one of {', '.join(devices)}, or a row in --ceilings")
    return devices[gpu.lower()]


def _holder(backend: str, dtype: str, quantization: str | None) -> Any:
    from farthing.planner.footprint import BACKENDS, FLOAT_BYTES, Holder

    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if dtype not in ("auto", *FLOAT_BYTES):
        raise ValueError(f"dtype is {dtype!r}; expected auto, {', '.join(FLOAT_BYTES)}")
    if quantization not in (None, "int8", "int4"):
        raise ValueError(f"quantization is {quantization!r}; expected int8 or int4")
    item = 2 if dtype == "auto" and backend == "gpu" else FLOAT_BYTES.get(dtype, 4)
    return Holder(backend, item, quantization)


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


def _more_tokens(shard_plan: Any, ranks: list[RankMemory], cache_dtype: str, limit: int) -> int:
    """Additional cache tokens that fit on the fullest rank."""
    from farthing.planner.memory import cache_bytes_per_token

    places = [shard_plan.layout.place(r.rank) for r in ranks]
    return min(
        (limit - r.total) // cache_bytes_per_token(shard_plan, place, cache_dtype)
        for r, place in zip(ranks, places, strict=True)
    )


def _advice(parts: Any, holder: Any, serving: Any, limit: int) -> str:
    from farthing.planner.memory import fitting_layouts, most_hot_experts

    found = next(fitting_layouts(parts, holder, serving, limit), None)
    if found is None and (hot := most_hot_experts(parts, holder, serving, limit)) is not None:
        return (
            f"{serving.hot_experts} hot experts per layer exceed {limit / 1e9:.1f} GB; "
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


def _print_ranks(model: str, ranks: list[RankMemory], dp: int, limit: int | None, room: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{model}: planned memory of {len(ranks)} rank{'s' * (len(ranks) > 1)}" + (
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


def _print_estimate(
    model: str, device: Ceilings, shares: Shares, price: float, e: Estimate, as_json: bool
) -> None:
    if as_json:
        print(
            json.dumps({"kind": "estimate", "device": asdict(device), "shares": asdict(shares)} | asdict(e))
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "ESTIMATE, not measured",
        "prefill",
        "decode",
        title=f"{model} on {device.name}, ${price:g} per GPU-hour",
    )
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
