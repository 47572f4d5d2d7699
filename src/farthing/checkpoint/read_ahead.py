"""Requests tensors from the disk before they are read: page faults of a mapped file wait for each request.

The order is a guess. A tensor that is never read is skipped as soon as a later one is.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from farthing.checkpoint.header import MAX_HEADER

WINDOW = 512 << 20  # bytes requested ahead, which the page cache must hold


class ReadAhead:
    """A thread that stays at most WINDOW bytes ahead of `passed`; use it with `with`.

    order: (name, file) in the expected order. Does nothing where the system has no `posix_fadvise`.
    """

    def __init__(self, path: Path, order: Sequence[tuple[str, str]]) -> None:
        self._path, self._order = path, order
        self._at = {name: i for i, (name, _) in enumerate(order)}
        self._sizes: list[int] = []  # of the tensors requested so far
        self._ahead, self._next, self._stopped = 0, 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        if hasattr(os, "posix_fadvise"):
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def passed(self, name: str) -> None:
        """A tensor is being read."""
        at = self._at.get(name, -1)
        with self._changed:
            if at < self._next:
                return
            self._ahead -= sum(self._sizes[self._next : at + 1])
            self._next = at + 1
            self._changed.notify()

    def _run(self) -> None:
        spans: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {}
        try:
            for name, file in self._order:
                if file not in spans:
                    spans[file] = _opened(self._path / file)
                opened, of = spans[file]
                begin, end = of.get(name, (0, 0))
                if not self._reserve(end - begin):
                    return
                if end > begin:
                    os.posix_fadvise(opened, begin, end - begin, os.POSIX_FADV_WILLNEED)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # a damaged checkpoint is reported by the reader
        finally:
            for opened, _ in spans.values():
                os.close(opened)

    def _reserve(self, size: int) -> bool:
        """Wait until the next tensor may be requested; False at the end."""
        with self._changed:
            at = len(self._sizes)
            self._sizes.append(size)
            if at >= self._next:
                self._ahead += size
            most = max(WINDOW, size)
            self._changed.wait_for(lambda: self._stopped or self._ahead <= most or at < self._next)
            return not self._stopped


def _opened(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """A file and where its tensors begin and end."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > MAX_HEADER:
            raise ValueError(path)
        header = json.loads(file.read(start - 8))
    offsets = {name: e["data_offsets"] for name, e in header.items() if name != "__metadata__"}
    return os.open(path, os.O_RDONLY), {n: (start + a, start + b) for n, (a, b) in offsets.items()}
