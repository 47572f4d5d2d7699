"""Memory that this process has, and that it can still use."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

# Limit and use of a control group, in its second version and its first.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def resident(pid: int | None = None) -> int:
    """Resident bytes of a process, by default of this one; 0 where the system does not say."""
    return _pages(pid)[0] * os.sysconf("SC_PAGE_SIZE")


def written(pid: int | None = None) -> int:
    """Those that it has written: without files that it maps, such as packed weights."""
    own, shared = _pages(pid)
    return (own - shared) * os.sysconf("SC_PAGE_SIZE")


def _pages(pid: int | None) -> tuple[int, int]:
    try:
        fields = Path(f"/proc/{pid or 'self'}/statm").read_text().split()
    except OSError:
        return 0, 0
    return int(fields[1]), int(fields[2])


def available_memory() -> int:
    """Memory available to this process in bytes: the machine's, or its control group's if smaller."""
    free = _meminfo()
    for limit, used in _GROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(free, 1 << 20)


def machine_memory() -> int:
    """All memory of the machine in bytes, or of this process's control group if smaller."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, _ in _GROUPS:
        with suppress(OSError, ValueError):
            whole = min(whole, int(Path(limit).read_text()))
    return whole


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # not Linux: a conservative guess


def gigabytes(n: int) -> str:
    """`n` bytes for a message."""
    return f"{n / 1e9:,.1f} GB"


def keep_freed_memory() -> None:
    """Keep freed memory in the process (glibc): page faults on activations cost more than the arithmetic."""
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # with another C library only slower
        # One arena: what one thread frees, others use.
        for option, value in (
            (arena_max, 1),
            (mmap_max, 0),
            (trim_threshold, 2**31 - 1),
            (top_pad, 64 << 20),
        ):
            mallopt(option, value)


def return_freed_memory() -> None:
    """Give whole free pages back (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
