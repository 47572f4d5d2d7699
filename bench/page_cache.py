"""The page cache: drop files from it before a cold start, and see how much of a file it holds."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

IMPORTED = """
import sys
from importlib import import_module
for name in ("farthing.cli.serve", "farthing.server.run", "farthing.server.app", "farthing.llm"):
    import_module(name)
for module in list(sys.modules.values()):
    print(*(f for name in ("__file__", "__cached__") if (f := getattr(module, name, None))))
print(*{line.split()[-1] for line in open("/proc/self/maps") if " /" in line})
"""


def files_of_python() -> list[Path]:
    """The files that a server's imports read, and the libraries that they map."""
    found = subprocess.run([sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True)
    return [Path(name) for name in found.stdout.split()]


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache; pages that another process maps stay."""
    for path in paths:
        if not path.is_file():
            continue
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # only clean pages are dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def resident(path: Path) -> float:
    """Share of a file's pages that the page cache holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        view = np.frombuffer(memory, np.uint8)
        held = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        address, pages = (ctypes.c_void_p(a.ctypes.data) for a in (view, held))
        if libc.mincore(address, ctypes.c_size_t(len(view)), pages):
            raise OSError(ctypes.get_errno(), "mincore failed", str(path))
        del view
        return float((held & 1).mean())
