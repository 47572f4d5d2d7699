"""`farthing bench serve --workload agent`: multi-turn sessions that resend the conversation every turn."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

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
from farthing.cli.progress import token_progress
from farthing.cli.tables import print_percentiles, report

if TYPE_CHECKING:
    from farthing.bench.client import Target

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
