"""`farthing replay`: replay a load trace against scaling policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from farthing.fleet.forecast.short import SHORT_MODELS, ShortConfig
from farthing.fleet.replay.document import PlanConfig, ReplayConfig, replay_file

app = typer.Typer(add_completion=False, help="Replay a load trace against scaling policies.")

EPILOG = """Examples:

farthing replay                                         (the example trace, all policies)

farthing replay rates.csv --policy farthing,hpa,oracle --utilization 0.7 --load-time 600 --json

farthing replay rates.csv --policy stabilized-tuned,hpa-tuned --second-half --picture fleet.png"""


@app.command(epilog=EPILOG)
def main(
    trace: Annotated[Path | None, typer.Argument(help="Trace file. Default: the packaged example.")] = None,
    policy: Annotated[
        str, typer.Option(help="Comma-separated policies; NAME-tuned is tuned on the first half.")
    ] = "all",
    utilization: Annotated[float, typer.Option(help="Target utilization of a replica's capacity.")] = 0.7,
    load_time: Annotated[float, typer.Option(help="Seconds from launch to ready.")] = 600.0,
    capacity: Annotated[
        float | None, typer.Option(help="Load units/s per replica. Default: the mean load needs 20.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs, each with its own noise.")] = 5,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of the load's noise, redrawn every 10 s.")
    ] = 0.1,
    price: Annotated[float, typer.Option(help="Price per replica-hour.")] = 1.0,
    failures: Annotated[float, typer.Option(help="Failures per replica and day.")] = 0.0,
    second_half: Annotated[bool, typer.Option("--second-half", help="Report only the second half.")] = False,
    model: Annotated[
        str, typer.Option(help=f"Short-term forecaster: {', '.join(SHORT_MODELS)}.")
    ] = "mixture",
    plan: Annotated[
        bool, typer.Option("--plan/--no-plan", help="Use the day plan (Prophet) as a floor.")
    ] = True,
    picture: Annotated[
        Path | None, typer.Option(help="Plot of load, forecast and replicas to write.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Replay TRACE (plain or gzip CSV or JSON lines, recognized by its columns) against policies."""
    console = Console(stderr=True)
    try:
        config = ReplayConfig(
            utilization=utilization,
            load_time_s=load_time,
            capacity=capacity,
            seeds=seeds,
            noise=noise,
            price_per_hour=price,
            failures_per_day=failures,
            second_half=second_half,
            short=ShortConfig(model=model),
            plan=PlanConfig(enabled=plan),
        )
        with console.status("reading") as status:
            document = replay_file(trace, policy, config, picture, lambda text: status.update(text))
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
    forecaster = document["forecaster"]
    weights = ", ".join(f"{name} {weight:.0%}" for name, weight in forecaster["weights"].items())
    table.caption = f"forecaster: {forecaster['model']} ({weights}); policy `farthing`: rule slo"
    for column in ("policy", "instance-hours", "SLO %", "changes", "turns", "cost", "u"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, row in document["policies"].items():
        table.add_row(
            name,
            f"{row['instance_hours']:.1f}",
            f"{100 * row['slo']:.2f}",
            f"{row['changes']:.0f}",
            f"{row['direction_changes']:.0f}",
            f"{row['cost']:.2f}",
            f"{row['utilization']:.2f}",
        )
    Console().print(table)
