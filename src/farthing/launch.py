"""The time since this process was launched: since its start, or since a standby process got its command."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_IMPORTED = time.monotonic()
_begun: float | None = None  # monotonic


def begin() -> None:
    """Count from now: the wait of a standby process is no part of a replica's cold start."""
    global _begun
    _begun = time.monotonic()


def seconds() -> float:
    """Seconds since `begin`, else since the process started (where /proc is missing: since this import)."""
    if _begun is not None:
        return time.monotonic() - _begun
    with suppress(OSError, ValueError, IndexError, AttributeError):
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - _IMPORTED
