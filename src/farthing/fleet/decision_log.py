"""The decision log: one JSON line per decision."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from farthing.fleet.decisions import Decision

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
    return list(_whole(lines))[-last:] if last > 0 else []


def _whole(lines: Sequence[str] | deque[str]) -> Iterator[Decision]:
    for line in lines:
        if line.endswith("\n"):
            yield Decision.from_json(line)


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
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(Decision.from_json(line))
    return found
