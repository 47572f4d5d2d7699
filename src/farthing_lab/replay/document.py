"""Replay a trace file of any kind into a JSON document and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from farthing_lab.replay.pools import PoolsConfig, compare
from farthing_lab.replay.rate import Result
from farthing_lab.replay.requests import replay_requests
from farthing_lab.replay.run import POLICIES, Progress, Replay, ReplayConfig, base_of, replay
from farthing_lab.replay.trace import EXAMPLE, RequestTrace, read_trace


def replay_file(
    path: Path | None,
    policies: str,
    config: ReplayConfig,
    picture: Path | None = None,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Replay the trace at `path` (None: the example) against `policies` ("all" or comma-separated names)."""
    names = POLICIES if policies.strip() == "all" else tuple(name.strip() for name in policies.split(","))
    for name in names:
        base_of(name)
    trace = read_trace(path if path is not None else EXAMPLE)
    if isinstance(trace, RequestTrace):
        if picture is not None:
            raise ValueError(f"{trace.name}: got single requests; expected a rate trace for a picture")
        if config.second_half or config.failures_per_day:
            name = "--second-half" if config.second_half else "--failures"
            raise ValueError(f"{trace.name}: got single requests; expected a rate trace for {name}")
        return replay_requests(trace, names, config, progress)
    document, runs, made = replay(trace, names, config, progress)
    if picture is not None:
        progress("picture")
        plot(made, runs, picture)
    return document


def replay_pools(
    path: Path | None, pools: PoolsConfig, config: ReplayConfig, progress: Progress = lambda text: None
) -> dict[str, Any]:
    """Replay the requests at `path` in one pool and in separate prefill and decode pools."""
    trace = read_trace(path if path is not None else EXAMPLE)
    if not isinstance(trace, RequestTrace):
        raise ValueError(f"{trace.name}: got a rate trace; expected single requests for --pools")
    return compare(trace, pools, config, progress)


# Plot of a replay: the load with its forecasts, and below it the replicas of each policy.


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
