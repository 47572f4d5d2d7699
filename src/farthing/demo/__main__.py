"""The demo: compress, serve lever by lever, scale a fleet; under five minutes on two cores, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from farthing.cost import Prices
from farthing.demo.fleet import picture as fleet_picture
from farthing.demo.fleet import run_fleet
from farthing.demo.levers import Lever, measure, prompts, stream_one
from farthing.demo.report import print_table, write_html

REPORT = Path("demo-report.html")
log = Console(stderr=True)


def main() -> None:
    """Run every stage; Ctrl-C ends it cleanly."""
    started = time.perf_counter()
    machine = Prices.load().machine("cpu", count=os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="farthing-demo-") as directory:
        compressed = Path(directory) / "compressed"
        _title("1. The model")
        print(cli("inspect"))
        _title("2. Compress it")
        report = json.loads(
            cli(
                "compress",
                "mite",
                "--recipe",
                "int8",
                "-o",
                str(compressed),
                "--no-timing",
                "--max-tokens",
                "12000",
                "--json",
            )
        )
        print(
            f"{report['size_before'] / 1e6:.1f} MB -> {report['size_after'] / 1e6:.1f} MB, "
            f"perplexity {report['drop']:+.2%}, {report['seconds']:.0f} s"
        )
        _title("3. Serve it: one answer, streamed")
        prompt = prompts(1, seed=5)[0]
        print(prompt, end="")
        stream_one(Lever("", "mite"), prompt, lambda text: print(text, end="", flush=True))
        _title("4. Lever by lever")
        rows = [measure(lever, machine, log.print) for lever in levers(str(compressed))]
        _title("5. A fleet that follows the load: an hour of a DeepSeek-R1 service in a minute")
        fleet = run_fleet("mite", log.print)
        print(fleet.text)
    print_table(rows)
    sections: list[tuple[str, str, str | None]] = [
        ("Compression", json.dumps(report, indent=1), None),
        ("Fleet", fleet.text, fleet_picture(fleet)),
    ]
    write_html(REPORT, rows, sections)
    print(f"{REPORT.resolve()}; {time.perf_counter() - started:.0f} s in all")


def levers(compressed: str) -> list[Lever]:
    """Each adds one to the one before."""
    return [
        Lever("reference ops", "mite", ("--backend", "reference")),
        Lever("+ native kernels", "mite"),
        Lever("+ compression (int8)", compressed),
        Lever("+ speculation (text and MTP)", compressed, ("--speculate", "mtp+ngram")),
        Lever("+ adaptive experts", compressed, ("--speculate", "mtp+ngram", "--experts", "adaptive:0.7")),
    ]


def cli(*arguments: str) -> str:
    """Output of a `farthing` command; its progress goes to the terminal."""
    command = [sys.executable, "-m", "farthing.cli.app", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"`farthing {' '.join(arguments)}` ended with exit code {done.returncode}")
    return done.stdout


def _title(text: str) -> None:
    log.rule(f"[bold]{text}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
