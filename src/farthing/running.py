"""The servers of this user that run on this machine: a server writes a file and holds its lock until it ends.

The lock tells a running server from one that was killed, and its process from another with the same number.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from farthing.process import cache_dir


@dataclass(frozen=True, slots=True)
class Running:
    """A server: its process, address, and what it was told to serve."""

    pid: int
    url: str
    model: str
    started: float  # seconds since the epoch
    parent: int = 0  # process; of a server for one of several models, that of `farthing serve --models`


@contextmanager
def announced(server: Running) -> Iterator[None]:
    """List the server while the block runs; without a directory that can be written, it is not listed."""
    file = None
    with suppress(OSError, RuntimeError):
        path = _folder() / str(server.pid)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        json.dump(asdict(server), file)
        file.flush()
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            file.close()


def running() -> list[Running]:
    """The servers that run now, the oldest first, without those that another one started; what killed ones
    left is removed."""
    found = []
    with suppress(RuntimeError):
        for path in _folder().glob("[0-9]*"):
            with suppress(OSError, ValueError, TypeError):
                if server := _read(path):
                    found.append(server)
    own = {server.pid for server in found}
    return sorted((s for s in found if s.parent not in own), key=lambda server: server.started)


def _read(path: Path) -> Running | None:
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Running(**json.load(file))
    path.unlink(missing_ok=True)
    return None


def _folder() -> Path:
    return cache_dir() / "running"
