"""Decisions on record and in words: one JSON line each, and the report of `farthing fleet explain`."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from rich.text import Text

from farthing_fleet.types import Decision

DECISIONS = "decisions.jsonl"  # in the state directory
_TAIL = 128 << 10  # bytes of the log that `recent` reads


class DecisionLog:
    """Appends decisions to a JSON-lines file; past `max_bytes` the file is renamed to PATH.1."""

    def __init__(self, path: str | Path, max_bytes: int = 64 << 20) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, decision: Decision) -> None:
        """Append a line. If it cannot be written in full, removes it and raises OSError."""
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
            if written != len(data):  # the disk is full: the next line must not continue a partial one
                if written:
                    os.ftruncate(file.fileno(), end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def read_log(path: str | Path, last: int = 10) -> list[Decision]:
    """The last `last` decisions of a log, oldest first; skips a partial last line."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"decision log {path} does not exist; expected the controller's log")
    with path.open(encoding="utf-8") as file:
        lines = deque((line for line in file if line.strip()), maxlen=last + 1)
    whole = [line for line in lines if line.endswith("\n")]
    return [Decision.from_json(line) for line in whole[-last:]]


def recent(path: Path) -> list[Decision]:
    """The decisions in the last part of a log, oldest first, without reading all of it.

    Skips partial lines; empty if there is no log.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")[:-1]
    except OSError:
        return []
    records = []
    for line in lines:
        with suppress(ValueError):
            records.append(Decision.from_json(line))
    return records


# Decisions in words: a sentence for the dashboard, and the report of `farthing fleet explain`.

_ALL = 1 << 30
_KINDS = ("short", "mid", "realtime", "wake")  # before the colon of a reason


def last_decisions(state: Path, last: int, *, changes: bool = False) -> list[Decision]:
    """The last decisions of a state directory, oldest first; `changes`: only those that changed the count.

    Raises FileNotFoundError if no controller has written there.
    """
    path = state / DECISIONS
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
        named = (("short", levels.short), ("real time", levels.realtime))
        asked = ", ".join(f"{name} {value}" for name, value in named if value is not None)
        text.append(f"  levels: {asked or 'none'}\n  {decision.reason}\n")
        for alarm in decision.alarms:
            text.append(f"  alarm: {alarm}\n", "red")
    return text if decisions else Text("no such decision in the log\n")


def _change(decision: Decision) -> str:
    if decision.target == decision.current:
        return f"hold at {decision.current}"
    return f"{decision.action} {decision.current} -> {decision.target}"
