"""What the policy sees, remembers and decides."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

# The policy's state between decisions.


@dataclass
class PolicyState:
    """Saved as JSON for a restarted controller."""

    last_time: float | None = None
    last_change: float | None = None
    settle_until: float | None = None  # no scale-down before this: after a start or a jump of the clock
    # of the rule `published`:
    breach_since: float | None = None  # start of uninterrupted latency above the threshold
    step_time: float | None = None  # its last step, and what it asked for
    step_target: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PolicyState:
        try:
            data: dict[str, Any] = json.loads(text)
            known = {entry.name for entry in fields(cls)}  # an older version saved more
            if "last_time" not in data:
                raise TypeError("no last_time")
            return cls(**{name: value for name, value in data.items() if name in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a saved policy state ({error}): {text[:80]!r}") from error


# The policy's decisions, with everything needed to explain them later.

Level = Literal["short", "realtime"]


@dataclass(frozen=True)
class Need:
    """What one level requires, and why."""

    exact: float  # replicas before rounding up
    reason: str

    @property
    def replicas(self) -> int:
        """Whole replicas."""
        return whole(self.exact)


def whole(exact: float) -> int:
    """Replicas for a need: the ceiling, tolerating rounding of the division (2.0000000001 needs two)."""
    return math.ceil(exact - 1e-9)


Action = Literal["up", "down", "hold"]


@dataclass(frozen=True)
class Levels:
    """Replicas required by each level; None if the level has no estimate."""

    short: int | None = None
    realtime: int | None = None


@dataclass(frozen=True)
class Decision:
    """One decision of the policy."""

    time: float
    current: int
    target: int
    action: Action
    decided_by: str  # "short", "realtime", or what held it: "limits", "cooldown", "stale", …
    levels: Levels
    reason: str
    required: int | None = None  # the maximum of the levels, before down rule and limits
    alarms: tuple[str, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)  # snapshot, plan, capacity

    def to_json(self) -> str:
        """One line of JSON, keys in a fixed order, no newline."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Decision:
        """Inverse of `to_json`. Raises ValueError with the reason."""
        try:
            data = json.loads(line)
            levels = data.pop("levels")  # an older version had more of them
            levels = Levels(levels.get("short"), levels.get("realtime"))
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


@dataclass(frozen=True)
class Snapshot:
    """The signals at one time. None means that a signal is missing, which differs from zero.

    Units: rates per second (requests or tokens), durations and times in seconds of one clock (the wall clock
    in production, simulated seconds in a replay).
    """

    time: float  # when the signals were measured, same clock as `now` in Policy.decide
    current: int  # requested replicas: ready plus starting
    ready: int | None = None  # serving replicas
    request_rate: float | None = None  # requests/s arriving
    served_rate: float | None = None  # requests/s whose first token was generated
    prompt_token_rate: float | None = None  # tokens/s of their prompts
    output_token_rate: float | None = None  # tokens/s generated
    backlog: float | None = None  # waiting requests
    queue_time_s: float | None = None  # mean queue time of a request
    ttft_s: float | None = None  # mean time to first token
    tpot_s: float | None = None  # mean time per output token
    cached_share: float | None = None  # share of prompt tokens served by a prefix cache, 0..1
    late_share: float | None = None  # share of tokens after slo.ttft_s or slo.tpot_s, 0..1
    running: float | None = None  # running requests
    kv_usage: float | None = None  # share of the cache in use, 0..1
    cold_start_s: float | None = None  # P90 of launch-to-ready; None: the configured one
    stale: bool = False  # reported by the source (scrape failed, target down)

    @property
    def starting(self) -> int:
        """Replicas launched but not ready; 0 if `ready` is unknown."""
        return max(0, self.current - self.ready) if self.ready is not None else 0

    def load(self, unit: str) -> float | None:
        """The load in `unit`, per second: arriving "requests", or "tokens" processed."""
        if unit == "requests":
            return self.request_rate
        if self.prompt_token_rate is None or self.output_token_rate is None:
            return None
        return self.prompt_token_rate + self.output_token_rate
