"""The demo: a question and its answer, compression, the levers one by one, a fleet that scales; about five
minutes on two cores. Each part writes what it found into FOLDER as it ends, and is not run again while that
is there; the report is written anew after every part."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from farthing.bench.load import chat, complete
from farthing.cost.prices import Prices
from farthing.hub import EMBEDDED
from farthing_lab.demo.fleet import FleetRun, run_fleet
from farthing_lab.demo.levers import ROUNDS, Lever, Measured, Server, Trials
from farthing_lab.demo.processes import cli
from farthing_lab.demo.report import Answer, Compressed, Report, Round

REPORT = Path("demo-report.html")
FOLDER = Path("demo-report")
MAX_TOKENS = "12000"  # held-out tokens per evaluation
RELEASED = "smollm2-135m"  # of the catalogue: a package of the index has its file of 98 MB
QUESTION = "Why is the sky blue?"
CODE = "def fibonacci(n):\n"  # for the embedded model, which continues code
T = TypeVar("T", bound=Any)
log = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line of progress."""
    log.print(text, markup=False)


def main() -> int:
    """Run every part that is missing; Ctrl-C keeps those that ended. 1 if a part was left out."""
    began = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    report = Report(REPORT, Prices.load().machine("cpu", count=os.cpu_count() or 1))
    report.answer = part(report, "answer", QUESTION, Answer, ask)
    say(report.said)
    int4 = part(report, "int4", "Compression: INT4", Compressed, lambda: compress(EMBEDDED, "int4"))
    if int4:
        limits = ("--max-drop", "0.4%", "--max-tokens", MAX_TOKENS)
        make = lambda: compress(int4.path, "adaptive-experts", *limits)  # noqa: E731
        adaptive = part(report, "adaptive", "Compression: adaptive experts", Compressed, make)
        report.compressed = [int4, adaptive] if adaptive else [int4]
    report.levers = levers(report.compressed)
    with ExitStack() as stack:
        trials, rounds = Trials(stack, report.levers, say), []
        for turn in range(ROUNDS):
            title = f"Lever by lever, round {turn + 1} of {ROUNDS}"
            round_of = lambda turn=turn: Round([asdict(row) for row in trials.round(turn)])  # noqa: E731
            found = part(report, f"round-{turn + 1}", title, Round, round_of)
            rounds += [[Measured(**row) for row in found.rows]] if found else []
            report.rows = [Measured.medians(rows) for rows in zip(*rounds, strict=True)]
    title = "Autoscaling: three hours of a DeepSeek-R1 service in 80 seconds"
    report.fleet = part(report, "fleet", title, FleetRun, lambda: run_fleet(EMBEDDED, say))
    report.write()
    report.show()
    print(f"{REPORT.resolve()}, {time.monotonic() - began:.0f} s; remove {FOLDER}/ to measure again")
    return 1 if report.left_out else 0


def part(report: Report, name: str, title: str, kind: Callable[..., T], make: Callable[[], T]) -> T | None:
    """What a part found, now or in an earlier run; None if it failed, which the report then says."""
    log.rule(f"[bold]{title}")
    path = FOLDER / f"{name}.json"
    if path.exists():
        say(f"kept: {path}")
        return kind(**json.loads(path.read_text("utf-8")))
    report.write()
    try:
        found = make()
    except (OSError, RuntimeError, ValueError) as error:
        report.left_out[title] = str(error)
        say(f"left out: {error}")
        return None
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(found)), "utf-8")
    partial.replace(path)
    return found


def ask() -> Answer:
    """A released model's answer to QUESTION; where it cannot be downloaded, what the embedded one writes."""
    try:
        cli(say, "pull", RELEASED)
    except RuntimeError as error:
        say(f"{error}; the embedded model continues code instead")
        return _answered(EMBEDDED, CODE)
    return _answered(RELEASED, QUESTION)


def _answered(model: str, question: str) -> Answer:
    with ExitStack() as stack:
        server = Server(stack, model, say, ("--max-num-seqs", "1"))
        if model == EMBEDDED:
            work = complete(server.target, question, 160, temperature=0)
        else:
            work = chat(server.target, [{"role": "user", "content": question}], 160, temperature=0)
        found = server.watched(work)
    if found.error:
        raise RuntimeError(found.error)
    return Answer(model, question, found.text.strip(), found.output_tokens, found.ttft, found.e2e)


def compress(model: str, recipe: str, *options: str) -> Compressed:
    """Run `farthing compress`, then `farthing eval` of the result against the embedded model."""
    out = FOLDER / recipe
    shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
    options = ("--no-gate", "--no-timing", *options, "--json")
    report = json.loads(cli(say, "compress", model, "--recipe", recipe, "-o", str(out), *options))
    against = ("--against", str(out), "--max-tokens", MAX_TOKENS, "--json")
    found = json.loads(cli(say, "eval", EMBEDDED, *against))
    low, high = found["interval"]
    quality = f"{found['relative_increase']:+.2%} ({low:+.2%} … {high:+.2%})"
    before, after = report["size_before"] / 1e6, report["size_after"] / 1e6
    return Compressed(recipe, str(out), before, after, report["seconds"], quality)


def levers(compressed: list[Compressed]) -> list[Lever]:
    """The levers, each added to the previous ones."""
    found = [
        Lever("reference ops", EMBEDDED, ("--backend", "reference"), "baseline"),
        Lever("+ native kernels", EMBEDDED, (), "same weights"),
        *(Lever(f"+ {one.recipe}", one.path, (), one.quality) for one in compressed),
    ]
    last = found[-1]
    return [*found, Lever("+ speculation", last.model, ("--speculate", "mtp+ngram"), last.quality)]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
