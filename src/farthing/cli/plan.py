"""`farthing plan`: memory, throughput and price of a deployment, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing import no_collection
from farthing.cli.errors import Exit, errors_as_one_line, with_options
from farthing.cli.planned import Planned, PlanOptions, device_of, plan_of
from farthing.cli.tables import size
from farthing.hub import EMBEDDED
from farthing.memory import available_memory
from farthing.planner.estimate import (
    BANDWIDTH,
    INT8,
    Machine,
    Target,
    estimate,
    groups,
    serving,
    smallest,
)
from farthing.planner.memory import (
    fitting_layouts,
    most_hot_experts,
    smaller_options,
)
from farthing.planner.offers import measure
from farthing.planner.roofline import Workload, load_devices

if TYPE_CHECKING:
    from farthing.planner.estimate import CpuEstimate, Estimate
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
    servable = o.model == EMBEDDED or "/" in o.model or Path(o.model).exists()
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


# The part of `farthing plan` that needs --cores: throughput of a CPU server.


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
        here, together, measured_core = measure()
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
            device = device_of(o.gpu, devices)
            planned = plan_of(o, device)
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
    spread = f"--tp {layout.tp} --pp {layout.pp} --ep {layout.ep} ({layout.world} ranks)"
    if planned.alone:
        instead = f"{options} would fit; so would {spread}" if options else f"{spread} would fit"
        return f"the model exceeds {limit / 1e9:.1f} GB; {instead}"
    alone = f", as would {options} on one" if options else ""
    return f"the largest rank exceeds {limit / 1e9:.1f} GB; {spread} would fit{alone}"


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


def _print_machine(planned: Planned) -> None:
    """The memory of one process, which no other shares the model with."""
    from rich.console import Console
    from rich.table import Table

    (r,) = planned.ranks
    own = planned.holder.backend == "cpu" and planned.limit is None
    table = Table("weights", "cache", "buffers", "total", title=f"{planned.options.model}: memory")
    table.add_row(*map(size, (r.weights, r.cache, r.buffers, r.total)))
    console = Console()
    console.print(table)
    if planned.holder.backend != "gpu":
        console.print("not counted: Python and PyTorch, about 0.3 GB", highlight=False)
    if r.host:
        console.print(f"host memory for routed experts: {size(r.host)}", highlight=False)
    limit = available_memory() if own else planned.limit
    if limit is not None:
        where = "this machine has" if own else "limit"
        more = f"; room for {planned.room:,} more cache tokens" if planned.room else ""
        small = "" if r.total <= limit else ", which is not enough"
        console.print(f"{where} {size(limit)}{' available' * own}{small}{more}", highlight=False)


def _print_ranks(planned: Planned) -> None:
    from rich.console import Console
    from rich.table import Table

    ranks, dp, limit, room = planned.ranks, planned.options.dp, planned.limit, planned.room
    if planned.alone:
        _print_machine(planned)
        return
    title = f"{planned.options.model}: planned memory of {len(ranks)} rank{'s' * (len(ranks) > 1)}" + (
        f", {dp} replicas" if dp > 1 else ""
    )
    table = Table("rank", "layers", "experts", "weights", "cache", "buffers", "total", title=title)
    for r in ranks:
        numbers = (size(n) for n in (r.weights, r.cache, r.buffers, r.total))
        table.add_row(str(r.rank), f"{r.layers[0]}–{r.layers[1] - 1}", str(r.experts), *numbers)
    Console().print(table)
    if planned.holder.backend != "gpu":
        Console().print("not counted: Python and PyTorch, about 0.3 GB per process", highlight=False)
    if host := sum(r.host for r in ranks):
        Console().print(f"host memory for routed experts: {size(host)}")
    if limit is not None:
        Console().print(
            f"limit {size(limit)} per rank" + (f"; room for {room:,} more cache tokens" if room else "")
        )
