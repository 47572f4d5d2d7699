"""Decisions in words: a sentence for the dashboard, and the report of `farthing fleet explain`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.text import Text

from farthing.fleet.decision_log import read_log
from farthing.fleet.decisions import Decision

_ALL = 1 << 30
_KINDS = ("short", "mid", "realtime", "wake")  # before the colon of a reason


def last_decisions(state: Path, last: int, *, changes: bool = False) -> list[Decision]:
    """The last decisions of a state directory, oldest first; `changes`: only those that changed the count.

    Raises FileNotFoundError if no controller has written there.
    """
    path = state / "decisions.jsonl"
    if not changes:
        return read_log(path, last)
    return [d for d in read_log(path, _ALL) if d.target != d.current][-last:]


def sentence(decision: Decision) -> str:
    """What was decided and why, in one sentence."""
    kind, _, why = decision.reason.partition(": ")
    need, _, bound = (why if kind in _KINDS else decision.reason).partition("; ")
    need = need.replace(", needs ", ", which needs ")
    count = "1 replica" if decision.target == 1 else f"{decision.target} replicas"
    change = "Keeps" if decision.target == decision.current else f"Goes from {decision.current} to"
    return f"{change} {count}: {need}" + (f" ({bound})." if bound else ".")


def report(decisions: Sequence[Decision]) -> Text:
    """Per decision: time and action, the number of each level, the reason, and alarms."""
    text = Text()
    for decision in decisions:
        when = datetime.fromtimestamp(decision.time).astimezone().isoformat(sep=" ", timespec="seconds")
        style = {"up": "bold green", "down": "bold yellow", "hold": "dim"}[decision.action]
        text.append(f"{when}  {_change(decision)}", style)
        text.append(f"  decided by {decision.decided_by}\n")
        levels = decision.levels
        named = (("short", levels.short), ("mid", levels.mid), ("real time", levels.realtime))
        asked = ", ".join(f"{name} {value}" for name, value in named if value is not None)
        text.append(f"  levels: {asked or 'none'}\n  {decision.reason}\n")
        for alarm in decision.alarms:
            text.append(f"  alarm: {alarm}\n", "red")
    return text if decisions else Text("no such decision in the log\n")


def _change(decision: Decision) -> str:
    if decision.target == decision.current:
        return f"hold at {decision.current}"
    return f"{decision.action} {decision.current} -> {decision.target}"
