"""Reads a packed file into the page cache while the process that will map it still imports its modules.

Pages are faulted in through a mapping that requests large ones, as `farthing.ops.cpu.packed_file` does; data
that another way of reading cached would keep small pages. They are unmapped again at once, so that they do
not count twice. Only Linux 5.14 and later do this; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
from pathlib import Path

log = logging.getLogger(__name__)

POPULATE_READ = 22  # MADV_POPULATE_READ
STEP = 32 << 20  # bytes
MOST = 0.5  # of the memory that is available: a larger file would evict its own pages


def page_in(path: Path) -> threading.Thread | None:
    """Start reading a file in a daemon thread; None if it is missing or too large."""
    if not path.is_file() or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    if not 0 < path.stat().st_size <= MOST * _available():
        return None
    thread = threading.Thread(target=_read, args=(path,), name="page-in", daemon=True)
    thread.start()
    return thread


def _available() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE + _cached()


def _cached() -> int:
    """Bytes of the page cache, which gives way to new pages."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) << 10
    return 0


def _read(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        advise = ctypes.CDLL(None, use_errno=True).madvise  # unlike mmap.madvise, releases the GIL
        for at in range(0, len(memory), STEP):
            part = (ctypes.c_void_p(start + at), ctypes.c_size_t(min(STEP, len(memory) - at)))
            if advise(*part, POPULATE_READ):
                log.debug("reading %s ahead stopped: %s", path, os.strerror(ctypes.get_errno()))
                return
            advise(*part, mmap.MADV_DONTNEED)
