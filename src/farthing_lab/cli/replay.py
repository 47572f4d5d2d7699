"""`farthing replay`: replay a load trace against scaling policies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from farthing.cli.errors import with_options
from farthing.config import option
from farthing_lab.replay.document import replay_file
from farthing_lab.replay.run import Progress, ReplayConfig

app = typer.Typer(add_completion=False, help="Replay a load trace against scaling policies.")

EPILOG = """Examples:

farthing replay                                         (the example trace, all policies)

farthing replay rates.csv --policy farthing,hpa,static --utilization 0.7 --load-time 600 --json

farthing replay rates.csv --load-time 120 --picture fleet.png"""


_option = partial(option, group="Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """The trace, the policies and the replicas they scale."""

    trace: Path | None = _option(None, "Trace file; default: the packaged example", argument=True)
    policy: str = _option(
        "all",
        "Comma-separated policies; best-NAME keeps the SLO of `farthing` with parameters chosen in hindsight",
    )
    utilization: float = _option(0.7, "Target utilization of the short rules")
    load_time: float = _option(600.0, "Seconds from launch to ready")
    capacity: float | None = _option(None, "Load units/s per replica; default: the mean load needs 20")
    seeds: int = _option(1, "Number of runs, each with its own noise")
    noise: float = _option(0.1, "Standard deviation of the load's noise, redrawn every 10 s")
    picture: Path | None = _option(None, "Plot of load, forecast and replicas to write")

    def config(self) -> ReplayConfig:
        """The replay's settings; their bounds are checked there."""
        return ReplayConfig(
            utilization=self.utilization,
            load_time_s=self.load_time,
            capacity=self.capacity,
            seeds=self.seeds,
            noise=self.noise,
        )

    def replay(self, progress: Progress) -> dict[str, Any]:
        """Replay the trace."""
        return replay_file(self.trace, self.policy, self.config(), self.picture, progress)


@app.command(epilog=EPILOG)
@with_options(options=ReplayOptions)
def main(
    options: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Replay TRACE (plain or gzip CSV or JSON lines, recognized by its columns) against policies."""
    given = ReplayOptions(**options)
    console = Console(stderr=True)
    try:
        with console.status("reading") as status:
            document = given.replay(lambda text: status.update(text))
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(document))
        return
    _print(document)


def _print(document: dict[str, Any]) -> None:
    table = Table(
        title=f"{document['trace']}, {document['hours']:.1f} h, load time {document['load_time_s']:g} s"
    )
    for column in ("policy", "instance-hours", "SLO %", "changes", "parameters"):
        table.add_column(column, justify="left" if column in ("policy", "parameters") else "right")
    for name, row in document["policies"].items():
        cells = [_cell(row, "instance_hours", ".1f"), _cell(row, "slo", ".2f", 100)]
        table.add_row(name, *cells, _cell(row, "changes", ".0f"), row["parameters"])
    rules = document["policies"].get("farthing", {}).get("rules", {})
    if rules:
        used = "; ".join(f"{share:.0%} {rule}" for rule, share in list(rules.items())[:3])
        table.caption = f"farthing: {used}. best-: parameters chosen in hindsight that keep its SLO"
    Console().print(table)


def _cell(row: dict[str, Any], key: str, form: str, factor: float = 1.0) -> str:
    value = row.get(key)
    return "" if value is None else f"{factor * value:{form}}"
