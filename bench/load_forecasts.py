"""Quality of the short-term level: pinball loss, coverage and WAPE, per trace and model.

    python bench/load_forecasts.py --traces DIR [--models mixture,growth,naive] [--only r1,m-small]

Two tables over the second half of each trace: the peak within 600 s from minute means with 10 % noise (the
level as the policy uses it; short-term models only), and the next ten-minute mean. It takes minutes per
trace. DIR holds the traces of docs/lab/load-traces.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from farthing_fleet.forecast.base import Series
from farthing_fleet.forecast.members import PATHS, make
from farthing_fleet.forecast.short import ShortConfig
from farthing_lab.replay.backtest import Backtest, backtest, backtest_short
from farthing_lab.replay.trace import EXAMPLE, rate_load, read_trace

HORIZON_S = 600.0
SEED = 7  # of the noise
console = Console(width=150)


def minutes(series: Series) -> Series:
    """Minute means of the interpolated trace with noise, as a controller sees them."""
    load = rate_load(series, 10.0, SEED + 1, 0.1)[:, SEED]
    whole = len(load) // 6 * 6
    return Series(series.start, 60.0, load[:whole].reshape(-1, 6).mean(axis=1), series.name)


def traces(folder: Path) -> dict[str, Series]:
    """The ten-minute traces by name."""
    large = read_trace(folder / "servegen_language_m-large_rate.csv")
    small = read_trace(folder / "servegen_language_m-small_rate.csv")
    r1 = read_trace(EXAMPLE)
    assert isinstance(large, Series) and isinstance(small, Series) and isinstance(r1, Series)
    return {"r1": r1, "m-large 1-7": large.head(7 * 144), "m-large": large, "m-small": small}


def row(series: Series, model: str) -> tuple[str, ...]:
    """Pinball loss, coverage and WAPE in percent; the weights of a mixture."""
    if model in PATHS:
        report = backtest(series, make(model), HORIZON_S, Backtest(), lambda text: None)
        return ("", f"{report['coverage']:.1f}", f"{report['wape']:.2f}", "")
    report = backtest_short(series, ShortConfig(model=model), HORIZON_S)
    weights = " ".join(f"{name} {share:.0%}" for name, share in report["weights"].items())
    pinball, coverage, wape = report["pinball"], report["coverage"], report["wape"]
    return (f"{pinball:.2f}", f"{coverage:.1f}", f"{wape:.2f}", weights if model == "mixture" else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--models", default="mixture,growth,last-value,naive,ar")
    parser.add_argument("--only", help="names of traces; all by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = traces(args.traces)
    for title, view in (("peak within 600 s, minutes", minutes), ("next ten minutes", lambda s: s)):
        table = Table(title=title)
        for head in ("trace", "model", "pinball %", "coverage %", "WAPE %", "weights"):
            table.add_column(head)
        for name, series in found.items():
            for model in args.models.split(","):
                chosen = args.only is None or name in args.only.split(",")
                if chosen and not (view is minutes and model in PATHS):
                    table.add_row(name, model, *row(view(series), model))
        console.print(table)


if __name__ == "__main__":
    main()
