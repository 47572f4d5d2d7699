"""The policy's state between decisions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PolicyState:
    """Saved as JSON for a restarted controller."""

    last_time: float | None = None
    last_change: float | None = None
    settle_until: float | None = None  # no scale-down before this: after a start or a jump of the clock
    breach_since: float | None = None  # start of uninterrupted latency above the threshold
    step_time: float | None = None  # last step of the latency rule, and its target
    step_target: int = 0
    utilization: float | None = None  # as adjusted by the SLO
    slo_time: float | None = None  # time of the last adjustment
    excused_until: float | None = None  # end of the lateness that a jump of the load causes
    planned: list[tuple[float, float]] = field(default_factory=list)  # (time, load planned for)
    history: list[tuple[float, float]] = field(
        default_factory=list
    )  # (time, need) of the stabilization window

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PolicyState:
        try:
            data: dict[str, Any] = json.loads(text)
            data["planned"] = [(float(t), float(n)) for t, n in data.get("planned", [])]
            data["history"] = [(float(t), float(n)) for t, n in data.get("history", [])]
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a saved policy state ({error}): {text[:80]!r}") from error
