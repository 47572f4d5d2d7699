"""The targets of the replay and the forecasters: ours, peers and the oracle in one run.

    python bench/replay.py --traces DIR [--figures DIR] [--only r1,m-large,m-small,taxi,forecast] [--seeds 5]

DIR holds the traces of docs/lab/load-traces.md; without it only DeepSeek-R1 is replayed.
Only fit times depend on the machine; all other figures depend only on the traces.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from farthing_fleet.forecast.base import Series, read_series
from farthing_fleet.forecast.members import make
from farthing_lab.replay.backtest import Backtest, backtest
from farthing_lab.replay.document import plot
from farthing_lab.replay.run import PlanConfig, Replay, ReplayConfig
from farthing_lab.replay.trace import EXAMPLE, read_trace

OURS = ("farthing", "stabilized", "published")
FINE = tuple(round(0.40 + 0.01 * k, 2) for k in range(56))
console = Console(width=150)


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def at_slo(curve: list[tuple[float, float, float]], slo: float) -> tuple[float, float]:
    """(utilization, hours) where the curve reaches `slo`, by linear interpolation."""
    rows = sorted(curve, key=lambda row: row[2])
    for (u0, s0, h0), (u1, s1, h1) in pairwise(rows):
        if s0 < slo <= s1:
            share = (slo - s0) / (s1 - s0)
            return u0 + share * (u1 - u0), h0 + share * (h1 - h0)
    return rows[0][0], rows[0][2] if rows[0][1] >= slo else float("nan")


def fixed(made: Replay, title: str, bar: str, half: int | None, figure: Path | None) -> None:
    """All policies at the configured utilization."""
    table = Table(title=f"{title}: u = {made.config.utilization:g}, {made.config.seeds} seeds. Bar: {bar}")
    for name in ("policy", "SLO %", "instance-hours", "x oracle(0.7)", "changes", "turns/h"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    oracle = float(made.oracle(made.config.utilization, half).mean())
    span = made.span(half)
    hours = (span.stop - span.start) * made.setting.tick_s / 3600
    runs = {}
    for name in (*OURS, "short", "mid", "realtime", "hpa", "keda", "static"):
        say(f"{title}: {name}")
        run = runs[name] = made.run(name, [made.config.utilization], half)
        cost, turns = float(run.instance_hours.mean()), float(run.direction_changes.mean()) / hours
        row = (
            f"{100 * run.slo.mean():.2f}",
            f"{cost:.1f}",
            f"{cost / oracle:.3f}",
            f"{run.changes.mean():.0f}",
        )
        table.add_row(name, *row, f"{turns:.2f}")
    table.add_row("oracle", "100", f"{oracle:.1f}", "1.000", "", "")
    console.print(table)
    if figure is not None and half is None:
        plot(made, {name: runs[name] for name in ("farthing", "hpa", "static")}, figure)


def equal_slo(made: Replay, title: str, bar: str) -> None:
    """Cost at equal SLO on the second half, and results there with a utilization tuned on the first half."""
    table = Table(title=f"{title}: second half, equal SLO 99.5 %, {made.config.seeds} seeds. Bar: {bar}")
    heads = (
        "policy",
        "u at SLO",
        "x oracle(1.0)",
        "against HPA",
        "u tuned on 1st half",
        "SLO % 2nd",
        "x oracle(1.0) 2nd",
    )
    for name in heads:
        table.add_column(name, justify="left" if name == "policy" else "right")
    limit = float(made.oracle(1.0, 1).mean())
    say(f"{title}: hpa")
    hpa = at_slo(made.curve("hpa", FINE, 1), made.config.slo_target)[1]
    for name in ("hpa", "keda", "stabilized", "published"):
        say(f"{title}: {name}")
        u, hours = at_slo(made.curve(name, FINE, 1), made.config.slo_target)
        tuned = made.tune(name)
        run = made.run(name, [tuned], 1)
        ratio = float(run.instance_hours.mean()) / limit
        equal = (f"{u:.3f}", f"{hours / limit:.3f}", f"{100 * (hours / hpa - 1):+.1f} %")
        table.add_row(name, *equal, f"{tuned:.2f}", f"{100 * run.slo.mean():.2f}", f"{ratio:.3f}")
    console.print(table)


def forecasts(traces: Path) -> None:
    table = Table(title="Forecasts, rolling origin on the second half")
    for name in (
        "series",
        "model",
        "horizon",
        "WAPE %",
        "coverage %",
        "vs last %",
        "vs seasonal %",
        "fit s",
        "bar",
    ):
        table.add_column(name)
    large, taxi = traces / "servegen_language_m-large_rate.csv", traces / "nab_nyc_taxi.csv.gz"
    cases = (
        (large, "naive", 600, 1, ""),
        (taxi, "profile", 86400, 3, ""),
        (taxi, "prophet", 86400, 3, "WAPE <= 6.75"),
        (taxi, "day", 86400, 3, "WAPE <= 6.75, vs seasonal >= 10 %"),
    )
    for path, model, horizon, refit_days, bar in cases:
        say(f"forecast {path.name} {model} {horizon} s")
        country = "US" if path is taxi else None
        plan = Backtest(refit_s=refit_days * 86400.0)
        row = backtest(read_series(path), make(model, country), horizon, plan, lambda text: None)
        figures = (
            row["wape"],
            row["coverage"],
            row["skill_vs_last"],
            row["skill_vs_seasonal"],
            row["fit_seconds"],
        )
        say("  " + ", ".join(f"{x:.2f}" for x in figures))
        table.add_row(path.name.split(".")[0], model, f"{horizon} s", *(f"{x:.2f}" for x in figures), bar)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, help="directory of the traces")
    parser.add_argument("--figures", type=Path, help="directory for the pictures")
    parser.add_argument("--only", default="r1,m-large,m-small,taxi,forecast")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    only = set(args.only.split(","))
    np.seterr(all="raise", under="ignore")

    def ready(path: Path, plan: bool = True) -> Replay:
        series = read_trace(path)
        assert isinstance(series, Series)
        return Replay(series, ReplayConfig(seeds=args.seeds, plan=PlanConfig(enabled=plan)), say)

    def figure(name: str) -> Path | None:
        return args.figures / name if args.figures else None

    if "r1" in only:
        made = ready(EXAMPLE)
        fixed(
            made, "DeepSeek-R1 24 h", "SLO >= 99.5 % at <= 1.20 x oracle(0.7)", None, figure("replay-r1.png")
        )
        equal_slo(made, "DeepSeek-R1 24 h", "10 % below the tuned HPA")
    if args.traces is None:
        say("no --traces: the other rows are skipped")
        return
    if "m-large" in only:
        made = ready(args.traces / "servegen_language_m-large_rate.csv")
        equal_slo(made, "m-large 14 days", "not above the tuned HPA; stretch 5 % below")
    if "m-small" in only:
        made = ready(args.traces / "servegen_language_m-small_rate.csv")
        fixed(made, "m-small 14 days (held out)", "SLO >= 99.5 % at <= 1.20 x oracle(0.7)", None, None)
    if "taxi" in only:
        for plan in (True, False):
            made = ready(args.traces / "nab_nyc_taxi.csv.gz", plan)
            title = "taxi" if plan else "taxi without the day plan"
            fixed(made, title, "100 % at <= 1.05 x oracle(0.7), <= 6 turns/h", 1, None)
    if "forecast" in only:
        forecasts(args.traces)


if __name__ == "__main__":
    main()
