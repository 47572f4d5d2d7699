"""The page cache: drop files from it before a cold start, and see how much of a file it holds."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np


def files_of_python() -> Iterator[Path]:
    """Every file that this interpreter could import or load."""
    for directory in map(Path, sys.path):
        if directory.is_dir():
            yield from (f for f in directory.rglob("*") if f.suffix in (".py", ".pyc", ".so", ".json"))


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
