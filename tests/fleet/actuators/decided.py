"""A decision of the policy, as actuators get it."""

from __future__ import annotations

from dataclasses import asdict

from farthing_fleet.types import Decision, Levels, Snapshot


def decision(target: int = 7, **signals: float | None) -> Decision:
    """A scale-up from five replicas that the short-term forecast decided, with its signals."""
    snapshot = Snapshot(time=0.0, current=5, **signals)  # type: ignore[arg-type]
    return Decision(
        time=0.0,
        current=5,
        target=target,
        action="up",
        decided_by="short",
        levels=Levels(short=target),
        reason="test",
        inputs={"snapshot": asdict(snapshot)},
    )
