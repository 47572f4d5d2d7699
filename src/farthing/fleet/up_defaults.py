"""The configuration of a local fleet: defaults, overridden by a YAML file, overridden by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from farthing.fleet.config import FleetConfig, SignalsConfig, load
from farthing.fleet.policy_config import PolicyConfig

# A local replica is ready in seconds, so intervals are seconds here; a cluster uses quarter minutes.
_LOCAL = {
    "interval_s": 1.0,
    "cold_start_s": 5.0,
    "latency_for_s": 2.0,
    "stale_after_s": 10.0,
    "drain_s": 5.0,
    "stabilization_s": 60.0,
    "cooldown_s": 60.0,
}


def local_fleet(
    path: Path | None,
    *,
    policy: Mapping[str, Any],
    metrics_names: str,
    state: Path,
    metrics: str,
    advise: bool,
) -> FleetConfig:
    """Build the configuration. Raises ValueError with the invalid field."""
    if path is not None:
        loaded = load(path)
        return replace(loaded, state=state, metrics=metrics, advise=advise or loaded.advise)
    return FleetConfig(
        policy=PolicyConfig(**{**_LOCAL, **policy}),
        signals=SignalsConfig(metrics=metrics_names, window_s=5.0, timeout_s=2.0),
        state=state,
        metrics=metrics,
        advise=advise,
    )
