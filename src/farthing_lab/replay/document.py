"""Replay a trace file of any kind into a JSON document and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from farthing_lab.replay.rate import Result
from farthing_lab.replay.requests import replay_requests
from farthing_lab.replay.run import POLICIES, SHORT_RULES, Progress, Replay, ReplayConfig, base_of, replay
from farthing_lab.replay.trace import EXAMPLE, RequestTrace, read_trace

REQUEST_POLICIES = ("farthing", "published", *SHORT_RULES, "static")


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
        names = tuple(name for name in names if policies.strip() != "all" or name in REQUEST_POLICIES)
        return replay_requests(trace, names, config, progress)
    document, runs, made = replay(trace, names, config, progress)
    if picture is not None:
        progress("picture")
        plot(made, runs, picture)
    return document


def plot(made: Replay, runs: dict[str, Result], path: Path) -> None:
    """Plot the first seed's load and replicas. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    hours = np.arange(made.ticks) * made.setting.tick_s / 3600
    thin = max(1, len(hours) // 2000)
    figure, (above, below) = plt.subplots(2, 1, figsize=(12, 7), sharex=True, layout="constrained")
    above.plot(hours[::thin], made.rate[::thin, 0], lw=0.8, color="black", label="load (60 s)")
    above.set_ylabel("load units/s")
    above.set_title(f"{made.series.name}, load time {made.config.load_time_s:g} s")
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
