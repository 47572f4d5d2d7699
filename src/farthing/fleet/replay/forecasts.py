"""The short-term level in a replay: the production `ShortLevel` over the replayed load.

Its members are trained on the first run, on the production schedule. Results are cached in the user's cache
directory by trace, settings and packaged weights, so that a second replay starts at once.

Shapes: T = ticks, B = runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from farthing import files
from farthing.cache_dir import cache_dir
from farthing.fleet.forecast.base import Floats
from farthing.fleet.forecast.history import History
from farthing.fleet.forecast.short import ShortConfig, capped, walk

_FORMAT = 5


@dataclass(frozen=True)
class ShortTrack:
    """The short level's output at each tick."""

    bound: Floats  # [T, B] 0.9 bound on the peak within the lead
    weights: dict[str, float]  # mean weight of each member


def short_track(raw: Floats, tick_s: float, lead_s: float, config: ShortConfig) -> ShortTrack:
    """Run the level over `raw` [T, B], the mean load known at each tick; uses only complete steps."""
    config = replace(config, lead_s=lead_s)
    every = max(1, round(config.grid_s / tick_s))
    whole = len(raw) // every * every
    steps = raw[:whole].reshape(-1, every, raw.shape[1]).mean(axis=1)
    path = _cache(steps, config)
    if path.exists():
        with np.load(path) as kept:
            bound, weights = kept["bound"], kept["weights"]
            names = [str(name) for name in kept["names"]]
    else:
        history = History(steps, every * tick_s, lead_s, growth=config.pace)
        made, names = walk(history, config)
        bound, weights = capped(made.p90, history).astype(np.float32), made.weights.mean(axis=(0, 2))
        _keep(path, bound, weights, names)
    # a step is known from the tick at which it ends
    ticks = np.repeat(bound.astype(np.float64), every, axis=0)
    shifted = np.concatenate([raw[: every - 1] * 1.25, ticks])[: len(raw)]
    if len(shifted) < len(raw):
        shifted = np.concatenate([shifted, np.repeat(shifted[-1:], len(raw) - len(shifted), axis=0)])
    return ShortTrack(shifted, dict(zip(names, weights.round(3).tolist(), strict=True)))


def _cache(steps: Floats, config: ShortConfig) -> Path:
    digest = hashlib.sha256(steps.tobytes())
    digest.update(repr((_FORMAT, steps.shape, replace(config, pretrained=Path()))).encode())
    digest.update(config.pretrained.read_bytes() if config.pretrained.exists() else b"")
    root = cache_dir() / "replay"
    return root / f"{digest.hexdigest()[:32]}.npz"


def _keep(path: Path, bound: Floats, weights: Floats, names: list[str]) -> None:
    """Write atomically; a failed write only costs time."""

    def write(scratch: Path) -> None:
        with scratch.open("wb") as file:
            np.savez(file, bound=bound, weights=weights, names=np.array(names))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, write)
    except OSError:
        return
