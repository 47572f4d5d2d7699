"""The default against the rules of twenty lines, per trace and cold start.

    python bench/replay.py TRACE... [--cold-starts 10,120,600,1200] [--days N]

The parameters of the short rules are chosen in hindsight, at the default's own share of requests in time.
All figures depend only on the traces.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from farthing_lab.replay.run import SHORT_RULES, Replay, ReplayConfig
from farthing_lab.replay.trace import binned, read_trace
from farthing_lab.series import Series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--cold-starts", default="10,120,600,1200")
    parser.add_argument("--days", type=float, default=14.0, help="of a trace that are replayed at most")
    chosen = parser.parse_args()
    table = Table(title="hours of the default over those of the best short rule, at the default's SLO")
    for name in ("trace", "cold start", "SLO %", "hours", "changes", *SHORT_RULES, "of the best"):
        table.add_column(name, justify="left" if name == "trace" else "right")
    ratios = []
    for path in chosen.traces:
        trace = read_trace(path)
        series = trace if isinstance(trace, Series) else binned(trace)
        series = series.head(round(chosen.days * series.per_day))
        for cold_start in map(float, chosen.cold_starts.split(",")):
            made = Replay(series, ReplayConfig(load_time_s=cold_start))
            row, _ = made.outcome("farthing", 0.0)
            found = [made.best(row["slo"], name) for name in SHORT_RULES]
            cells = [f"{row['instance_hours'] / best[2]:.3f}" if best else "none" for best in found]
            ratio = max((row["instance_hours"] / best[2] for best in found if best), default=0.0)
            ratios.append(ratio)
            hours = f"{row['instance_hours']:.1f}"
            told = (f"{cold_start:g} s", f"{100 * row['slo']:.2f}", hours, f"{row['changes']:.0f}")
            table.add_row(series.name, *told, *cells, f"{ratio:.3f}")
    Console(width=140).print(table)
    over = sum(ratio > 1.03 for ratio in ratios)
    print(f"median {np.median(ratios):.3f}, highest {max(ratios):.3f}, {over} of {len(ratios)} above 1.03")


if __name__ == "__main__":
    main()
