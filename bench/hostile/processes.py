"""Ports and memory of the processes that the bench starts."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def resident(pid: int) -> int:
    """Resident bytes of a process and its descendants; a page that several map counts once."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        waiting += [child for child, parent in parents.items() if parent == one]
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            found += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found
