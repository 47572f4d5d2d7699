"""`farthing forecast`: backtests of the load forecasters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farthing_fleet.forecast.base import read_series
from farthing_fleet.forecast.members import PATHS, make
from farthing_fleet.forecast.short import ShortConfig
from farthing_lab.replay.backtest import MODELS, UNDEFINED, Backtest, backtest, backtest_short, parse_horizon

app = typer.Typer(add_completion=False, help="Backtest the load forecasters on a series.")

EPILOG = """Examples:

farthing forecast rates.csv --model mixture --horizon 10m --json

farthing forecast taxi.csv.gz --model prophet --horizon 24h --country US"""


@app.command(epilog=EPILOG)
def main(
    series: Annotated[
        Path,
        typer.Argument(
            metavar="SERIES", help="CSV with t_s,total_rate_rps or timestamp,value columns; plain or gzip."
        ),
    ],
    model: Annotated[str, typer.Option(help=f"Forecaster: {', '.join(MODELS)}.")] = "mixture",
    horizon: Annotated[str, typer.Option(help="Forecast horizon: 10m, 24h, …")] = "10m",
    begin: Annotated[float, typer.Option(help="Share of the series used before the first forecast.")] = 0.5,
    refit: Annotated[str, typer.Option(help="Time between fits.")] = "24h",
    country: Annotated[
        str | None, typer.Option(help="Country of the public holidays for Prophet: US, DE, …")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Backtest a forecaster on SERIES with a rolling origin."""
    console = Console(stderr=True)
    try:
        plan = Backtest(begin=begin, refit_s=parse_horizon(refit))
        with console.status("reading") as status:
            data = read_series(series)
            ahead = parse_horizon(horizon)
            if model in MODELS and model not in PATHS:
                report = backtest_short(data, ShortConfig(model=model), ahead, plan)
            else:
                report = backtest(data, make(model, country), ahead, plan, lambda t: status.update(t))
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        text = f"undefined ({UNDEFINED[name]})" if value is None else value
        Console().print(f"{name:>18} {value:.3f}" if isinstance(value, float) else f"{name:>18} {text}")
