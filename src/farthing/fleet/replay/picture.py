"""Plot of a replay: the load with its forecasts, and below it the replicas of each policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from farthing.fleet.replay.rate import Result
from farthing.fleet.replay.run import Replay


def plot(made: Replay, runs: dict[str, Result], path: Path) -> None:
    """Plot the first seed's run to `path`, in the format of its suffix. Raises ModuleNotFoundError without
    matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    span = made.span(1 if made.config.second_half else None)
    hours = np.arange(span.start, span.stop) * made.setting.tick_s / 3600
    thin = max(1, len(hours) // 2000)
    figure, (above, below) = plt.subplots(2, 1, figsize=(12, 7), sharex=True, layout="constrained")
    lines = [("short: q90 of the peak", made.bound[span, 0], "tab:red")]
    plan = np.where(made.floor[span, 0] == made.rate[span, 0], np.nan, made.floor[span, 0])
    if not np.isnan(plan).all():  # without a plan the load replaces it
        lines.append(("mid: floor of the day plan", plan, "tab:blue"))
    lines.append(("load (60 s)", made.rate[span, 0], "black"))
    for label, values, colour in lines:
        above.plot(hours[::thin], values[::thin], lw=0.8, color=colour, label=label)
    above.set_ylabel("load units/s")
    above.set_title(
        f"{made.series.name}: u = {made.config.utilization:g}, load time {made.config.load_time_s:g} s"
    )
    for name, run in runs.items():
        below.step(hours[::thin], run.current[::thin], lw=0.9, where="post", label=name)
    below.set_ylabel("replicas billed")
    below.set_xlabel("hours")
    for axis in (above, below):
        axis.legend(loc="upper left", fontsize=8, ncols=3)
        axis.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
