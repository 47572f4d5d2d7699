"""What the policy sees (`Snapshot`, `Forecast`) and what it says (`Decision`), and the decision log.

Units: rates are per second (requests or tokens), durations in seconds, times in seconds of one clock (the
wall clock in production, simulated seconds in a replay). A decision is one JSON line; `read_log` reads the
last ones back.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Level = Literal["short", "mid", "realtime"]
Action = Literal["up", "down", "hold"]
FORECASTS = "forecasts.json"  # beside the log: the curves of the last turn, for the dashboard


@dataclass(frozen=True)
class Snapshot:
    """The signals of one instant. None means that a signal is missing, which is not the same as zero."""

    time: float  # when the signals were measured, same clock as `now` in Policy.decide
    current: int  # replicas asked for: ready and starting together
    ready: int | None = None  # replicas that serve now
    request_rate: float | None = None  # requests/s arriving
    prompt_token_rate: float | None = None  # tokens/s arriving
    output_token_rate: float | None = None  # tokens/s generated
    backlog: float | None = None  # requests that wait
    queue_time_s: float | None = None  # mean time a request waits before it runs
    ttft_s: float | None = None  # mean time to first token
    tpot_s: float | None = None  # mean time per output token
    cached_share: float | None = None  # share of the prompt tokens found in a prefix cache, 0..1
    late_share: float | None = None  # share of requests that missed the SLO lately, 0..1
    running: float | None = None  # requests that run
    kv_usage: float | None = None  # share of the cache in use, 0..1
    cold_start_s: float | None = None  # P90 of launch-to-ready; None: the configured one
    leaving: int = 0  # ready replicas with a notice: a spot machine that will be taken away
    stale: bool = False  # the source said so itself (scrape failed, target down)

    @property
    def starting(self) -> int:
        """Replicas launched and not yet ready; 0 where `ready` is unknown."""
        return max(0, self.current - self.ready) if self.ready is not None else 0

    def load(self, unit: str) -> float | None:
        """The load in `unit`, per second: arriving "requests", "prompt_tokens", "output_tokens", or "tokens"
        (prompt and output).
        """
        if unit == "requests":
            return self.request_rate
        if unit == "prompt_tokens":
            return self.prompt_token_rate
        if unit == "output_tokens":
            return self.output_token_rate
        if self.prompt_token_rate is None or self.output_token_rate is None:
            return None
        return self.prompt_token_rate + self.output_token_rate


@dataclass(frozen=True)
class Forecast:
    """A quantile forecast on a grid: value i holds over [start + i·step_s, start + (i+1)·step_s).

    The short-term forecaster gives one or a few steps, the day plan one a step for 24 hours.
    `skill` is 1 - error / error of the last value, running; below zero the forecaster was replaced and
    `source` names what replaced it.
    """

    start: float
    step_s: float
    p50: tuple[float, ...]
    p90: tuple[float, ...]
    source: str
    skill: float | None = None
    note: str = ""  # for instance "lstm replaced by last-value: running skill -0.12"
    weight: float | None = None  # of `source` where several forecasters are mixed

    def __post_init__(self) -> None:
        if len(self.p50) != len(self.p90) or not self.p50:
            raise ValueError(
                f"Forecast: p50 and p90 need one equal length >= 1, got {len(self.p50)} and {len(self.p90)}"
            )
        if not self.step_s > 0:
            raise ValueError(f"Forecast.step_s = {self.step_s}: a positive number of seconds is needed")
        if not all(math.isfinite(v) and v >= 0 for v in (*self.p50, *self.p90)):
            raise ValueError("Forecast: p50 and p90 must be finite and not negative")

    @property
    def end(self) -> float:
        return self.start + self.step_s * len(self.p50)

    def peak(self, begin: float, end: float, quantile: float = 0.9) -> float | None:
        """The largest value over [begin, end] at `quantile`; None where the forecast says nothing.

        Quantiles 0.5 and 0.9 are as forecast, others lie on the line through them.
        """
        first = max(0, math.floor((begin - self.start) / self.step_s))
        last = min(len(self.p50) - 1, math.floor((end - self.start) / self.step_s))
        if first > last:
            return None
        weight = (quantile - 0.5) / 0.4
        return max(
            max(0.0, low + weight * (high - low))
            for low, high in zip(self.p50[first : last + 1], self.p90[first : last + 1], strict=True)
        )


@dataclass(frozen=True)
class Levels:
    """Replicas each level asks for; None where the level had nothing to say."""

    short: int | None = None
    mid: int | None = None
    realtime: int | None = None


@dataclass(frozen=True)
class Decision:
    """One decision of the policy, complete enough to be explained later without anything else."""

    time: float
    current: int
    target: int
    action: Action
    decided_by: (
        str  # "short", "mid", "realtime", or what held or bounded it: "limits", "cooldown", "stale", …
    )
    levels: Levels
    reason: str
    required: int | None = None  # the maximum of the levels, before down rule and limits
    alarms: tuple[str, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)  # snapshot, forecasts' figures, capacity

    def to_json(self) -> str:
        """One line of JSON, keys in a fixed order, no newline."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Decision:
        """Inverse of `to_json`. Raises ValueError naming what is wrong with the line."""
        try:
            data = json.loads(line)
            levels = Levels(**data.pop("levels"))
            data["alarms"] = tuple(data.get("alarms", ()))
            return cls(levels=levels, **data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a decision line ({error}): {line[:80]!r}") from error

    def samples(self) -> dict[str, float]:
        """The decision as Prometheus gauges: name (without labels) to value; a silent level is absent."""
        gauges = {
            "farthing:fleet_current_replicas": float(self.current),
            "farthing:fleet_desired_replicas": float(self.target),
            "farthing:fleet_decision_time_seconds": self.time,
            "farthing:fleet_alarms": float(len(self.alarms)),
        }
        for level in fields(self.levels):
            value = getattr(self.levels, level.name)
            if value is not None:
                gauges[f"farthing:fleet_{level.name}_replicas"] = float(value)
        return gauges


class DecisionLog:
    """Appends decisions to a JSON-lines file; past `max_bytes` it becomes PATH.1 and a new one begins."""

    def __init__(self, path: str | Path, max_bytes: int = 64 << 20) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, decision: Decision) -> None:
        """Raises OSError where the whole line could not be written; none of it is left then."""
        line = decision.to_json() + "\n"
        if self.path.exists() and self.path.stat().st_size + len(line) > self.max_bytes:
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            data = line.encode()
            try:
                written = file.write(data)
            except OSError:
                written = 0
            if written != len(data):  # the disk is full: the next line must not continue half of this one
                if written:
                    os.ftruncate(file.fileno(), end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def read_log(path: str | Path, last: int = 10) -> list[Decision]:
    """The last `last` decisions of a log, oldest first; a line torn by a crash at the end is left out."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"decision log {path} does not exist: give the path the controller writes to")
    with path.open(encoding="utf-8") as file:
        lines = deque((line for line in file if line.strip()), maxlen=last + 1)
    return list(_whole(lines))[-last:] if last > 0 else []


def _whole(lines: Sequence[str] | deque[str]) -> Iterator[Decision]:
    for line in lines:
        if line.endswith("\n"):
            yield Decision.from_json(line)


def write_forecasts(path: Path, unit: str, short: Forecast | None, mid: Forecast | None) -> None:
    """Leave the forecasts of this turn for the dashboard, in one step."""
    found = {name: asdict(f) for name, f in (("short", short), ("mid", mid)) if f is not None}
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(json.dumps({"unit": unit, "forecasts": found}))
    scratch.replace(path)
