"""The policy's decisions, with everything needed to explain them later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Level = Literal["short", "mid", "realtime"]
Action = Literal["up", "down", "hold"]


@dataclass(frozen=True)
class Levels:
    """Replicas required by each level; None if the level has no estimate."""

    short: int | None = None
    mid: int | None = None
    realtime: int | None = None


@dataclass(frozen=True)
class Decision:
    """One decision of the policy."""

    time: float
    current: int
    target: int
    action: Action
    decided_by: str  # "short", "mid", "realtime", or what held it: "limits", "cooldown", "stale", …
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
        """Inverse of `to_json`. Raises ValueError with the reason."""
        try:
            data = json.loads(line)
            levels = Levels(**data.pop("levels"))
            data["alarms"] = tuple(data.get("alarms", ()))
            return cls(levels=levels, **data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a decision line ({error}): {line[:80]!r}") from error

    def samples(self) -> dict[str, float]:
        """Prometheus gauges of the decision: name (without labels) -> value, for levels with an estimate."""
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
