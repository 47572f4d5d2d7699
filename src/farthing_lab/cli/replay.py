"""`farthing replay`: replay a load trace against scaling policies."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from farthing.cli.errors import with_options
from farthing.config import option
from farthing_fleet.forecast.short import SHORT_MODELS, ShortConfig
from farthing_lab.replay.document import replay_file, replay_pools
from farthing_lab.replay.pools import PoolsConfig
from farthing_lab.replay.run import PlanConfig, Progress, ReplayConfig

app = typer.Typer(add_completion=False, help="Replay a load trace against scaling policies.")

EPILOG = """Examples:

farthing replay                                         (the example trace, all policies)

farthing replay rates.csv --policy farthing,hpa,oracle --utilization 0.7 --load-time 600 --json

farthing replay rates.csv --policy stabilized-tuned,hpa-tuned --second-half --picture fleet.png

farthing replay mooncake.jsonl.gz --pools --load-time 60 --tpot 0.05"""


_option = partial(option, group="Options")
_OF_POOLS = ("ttft", "tpot", "slo", "copies")
# --pools compares layouts under one policy, on single requests without noise
_NOT_OF_POOLS = ("policy", "capacity", "seeds", "noise", "price", "failures", "second_half", "picture")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """The trace, the policies and the replicas they scale."""

    trace: Path | None = _option(None, "Trace file; default: the packaged example", argument=True)
    policy: str = _option("all", "Comma-separated policies; NAME-tuned is tuned on the first half")
    utilization: float = _option(0.7, "Target utilization of a replica's capacity")
    load_time: float = _option(600.0, "Seconds from launch to ready")
    capacity: float | None = _option(None, "Load units/s per replica; default: the mean load needs 20")
    seeds: int = _option(5, "Number of runs, each with its own noise")
    noise: float = _option(0.1, "Standard deviation of the load's noise, redrawn every 10 s")
    price: float = _option(1.0, "Price per replica-hour")
    failures: float = _option(0.0, "Failures per replica and day")
    second_half: bool = _option(False, "Report only the second half")
    model: str = _option("mixture", f"Short-term forecaster: {', '.join(SHORT_MODELS)}")
    plan: bool = _option(True, "Use the day plan (Prophet) as a floor")
    picture: Path | None = _option(None, "Plot of load, forecast and replicas to write")
    pools: bool = _option(False, "Compare one pool with separate prefill and decode pools")
    ttft: float = _option(10.0, "With --pools: target of the time to first token, s")
    tpot: float = _option(0.1, "With --pools: target of the time per output token, s")
    slo: float = _option(0.99, "With --pools: share in time that the tuned rows and the oracle keep")
    copies: int = _option(1, "With --pools: replay the trace this many times at once, shifted")

    def config(self) -> ReplayConfig:
        """The replay's settings; their bounds are checked there."""
        return ReplayConfig(
            utilization=self.utilization,
            load_time_s=self.load_time,
            capacity=self.capacity,
            seeds=self.seeds,
            noise=self.noise,
            price_per_hour=self.price,
            failures_per_day=self.failures,
            second_half=self.second_half,
            short=ShortConfig(model=self.model),
            plan=PlanConfig(enabled=self.plan),
        )

    def _check(self) -> None:
        """Raises ValueError with an option that this kind of replay would ignore."""
        ignored = _NOT_OF_POOLS if self.pools else _OF_POOLS
        for declared in fields(self):
            value = getattr(self, declared.name)
            if declared.name in ignored and value != declared.default:
                flag = f"--{declared.name.replace('_', '-')}"
                accepted = "the default with --pools" if self.pools else "--pools with it"
                raise ValueError(f"{flag}: got {value}; expected {accepted}")

    def replay(self, progress: Progress) -> dict[str, Any]:
        """Replay the trace."""
        self._check()
        if self.pools:
            pools = PoolsConfig(ttft_s=self.ttft, tpot_s=self.tpot, slo=self.slo, copies=self.copies)
            return replay_pools(self.trace, pools, self.config(), progress)
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
    if given.pools:
        _print_pools(document)
    else:
        _print(document)


def _forecaster(document: dict[str, Any]) -> str:
    forecaster = document["forecaster"]
    weights = ", ".join(f"{name} {weight:.0%}" for name, weight in forecaster["weights"].items())
    return f"forecaster: {forecaster['model']} ({weights})"


def _print_pools(document: dict[str, Any]) -> None:
    table = Table(
        title=f"{document['trace']}, {document['requests']} requests, TTFT {document['ttft_s']:g} s, "
        f"TPOT {document['tpot_s']:g} s, load time {document['load_time_s']:g} s"
    )
    table.caption = (
        f"{_forecaster(document)}; rule slo; tuned and oracle: chosen on this trace; "
        f"advised for this load: {document['advised']}"
    )
    for column in ("layout", "replica-hours", "SLO %", "TTFT %", "TPOT %", "cached %", "u"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for name, row in document["layouts"].items():
        shares = [f"{100 * row[key]:.2f}" for key in ("slo", "ttft", "tpot", "cached")]
        used = ", ".join(f"{kind} {u:.2f}" for kind, u in row.get("utilization", {}).items())
        rule = "schedule" if name.endswith("oracle") else "by SLO"
        table.add_row(name, f"{row['instance_hours']:.2f}", *shares, used or rule)
    Console().print(table)


def _print(document: dict[str, Any]) -> None:
    table = Table(
        title=f"{document['trace']}, {document['hours']:.1f} h, load time {document['load_time_s']:g} s"
    )
    ours = document["policies"].get("farthing")
    table.caption = _forecaster(document) + (f"; policy `farthing`: rule {ours['rule']}" if ours else "")
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
