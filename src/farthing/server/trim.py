"""Freed memory is returned to the operating system.

glibc keeps the memory of large requests after they have ended: free chunks remain between live ones
in every thread's arena. malloc_trim(3) returns their whole pages.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_SECONDS = 10.0  # between looks at the resident memory
_GROWTH = 1.05  # resident memory over that after the last trim, for another one
_STATM = Path("/proc/self/statm")


def resident() -> int:
    """Resident bytes of this process."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Trimmer:
    """Trims the heap when the process has grown; pages that stay in use then count as its size."""

    def __init__(self, trim: Callable[[], object], size: Callable[[], int] = resident) -> None:
        self._trim, self._size = trim, size
        self._after_last = 0

    def check(self) -> None:
        """Trim if the process has grown by more than 5 % since the last trim."""
        if self._size() > _GROWTH * self._after_last:
            self._trim()
            self._after_last = self._size()


async def keep_trimmed() -> None:
    """Check every ten seconds, until cancelled. Returns at once where the C library cannot trim."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not _STATM.exists():
        return
    trimmer = Trimmer(lambda: trim(0))
    while True:
        await asyncio.sleep(_SECONDS)
        await asyncio.to_thread(trimmer.check)  # ctypes releases the GIL
