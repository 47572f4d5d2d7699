"""Replay a trace file of any kind into a JSON document and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farthing.fleet.replay.plan import PlanConfig
from farthing.fleet.replay.pools import compare
from farthing.fleet.replay.pools_load import PoolsConfig
from farthing.fleet.replay.requests import replay_requests
from farthing.fleet.replay.run import POLICIES, Progress, ReplayConfig, base_of, replay
from farthing.fleet.replay.trace import EXAMPLE, RequestTrace, read_trace

__all__ = ["PlanConfig", "PoolsConfig", "ReplayConfig", "replay_file", "replay_pools"]


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
        from farthing.fleet.replay.picture import plot

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
