"""Background reading and writing of cache blocks.

The engine's thread only appends to queues. The writer looks up blocks by hash when it reaches them and copies
them without holding a reference. It compares the block's reallocation count before and after the copy and
drops the copy if the count changed. A block is therefore lost if memory is reused faster than the disk
writes, and no step ever waits. Runs of consecutive blocks become files.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from farthing.engine.disk_cache.index import Index
from farthing.engine.disk_cache.memory import BlockMemory
from farthing.engine.disk_cache.segment import (
    Segment,
    SegmentError,
    Source,
    read_block,
    read_header,
    write_segment,
)
from farthing.engine.prefetch import Load
from farthing.engine.prefix_cache import PrefixCache
from farthing.engine.stats import DiskStats

log = logging.getLogger(__name__)

SEGMENT_BYTES = 32 << 20  # largest file; bench/prefix_disk.py compares sizes
_PERIOD = 0.25  # seconds between checks for computed blocks
_LINGER = 1.0  # seconds that a run waits for more blocks
_RECOUNT = 60.0  # seconds between counts of the directory
_PAUSE = 60.0  # seconds without writing after a disk error
_MOST_QUEUED = 1 << 14  # events from the engine; the oldest are dropped while the disk hangs


@dataclass(slots=True)
class _Run:
    """Consecutive blocks to write."""

    hashes: list[bytes] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class DiskStore:
    """A `BlockStore` over a directory."""

    def __init__(
        self,
        index: Index,
        memory: BlockMemory,
        block_size: int,
        stats: DiskStats,
        loaded: Callable[[Load[Any], int], None],
    ) -> None:
        """loaded: called in the reader's thread with a load and its number of filled blocks."""
        self._index, self._memory, self._block_size = index, memory, block_size
        self._stats, self._loaded = stats, loaded
        stats.stored_bytes = index.stored_bytes
        self._prefix = PrefixCache(block_size)
        self._notes: deque[tuple[bytes | None, list[bytes]]] = deque(maxlen=_MOST_QUEUED)
        self._runs: dict[bytes, _Run] = {}  # by their last hash
        self._queued: set[bytes] = set()  # blocks of all runs
        self._most = max(1, min(SEGMENT_BYTES, index.capacity // 16) // memory.block_bytes)
        self._paused_until = self._recount_at = 0.0
        self._warned = False
        self._stop = threading.Event()
        self._loads: SimpleQueue[Load[Any] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._write, name="farthing-disk-write", daemon=True),
            threading.Thread(target=self._read, name="farthing-disk-read", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- the engine's thread

    def attach(self, prefix: PrefixCache) -> None:
        """See `BlockStore`."""
        self._prefix = prefix

    def find(self, hashes: Sequence[bytes]) -> int:
        """See `BlockStore`."""
        return self._index.find(hashes)

    def read(self, load: Load[Any]) -> None:
        """See `BlockStore`."""
        self._loads.put(load)

    def computed(self, parent: bytes, hashes: list[bytes]) -> None:
        """See `BlockStore`."""
        self._notes.append((parent, hashes))

    def used(self, hashes: list[bytes]) -> None:
        """See `BlockStore`."""
        self._notes.append((None, hashes))

    def close(self) -> None:
        """Write the computed blocks and stop the threads."""
        self._stop.set()
        self._loads.put(None)
        for thread in self._threads:
            thread.join()

    # -- the reader

    def _read(self) -> None:
        while (load := self._loads.get()) is not None:
            good = 0
            try:
                good = self._fill(load)
            except Exception:
                log.exception("prefix cache: reading failed; computing the prompt instead")
            self._loaded(load, good)

    def _fill(self, load: Load[Any]) -> int:
        """Read the blocks of a load up to the first missing one. Returns their number."""
        began, good = time.perf_counter(), 0
        opened: tuple[str, int, Segment] | None = None
        try:
            for digest, block in zip(load.hashes, load.blocks, strict=True):
                while name := self._index.file_of(digest):
                    try:
                        if opened is None or opened[0] != name:
                            opened = self._open(name, opened)
                        self._read_block(opened, digest, block)
                        break
                    except (SegmentError, OSError) as error:
                        self._lost(name, error)
                else:
                    break
                good += 1
        finally:
            if opened is not None:
                os.close(opened[1])
        stats = self._stats
        stats.hits += good * self._block_size
        stats.read_bytes += good * self._memory.block_bytes
        stats.read_seconds += time.perf_counter() - began
        return good

    def _open(self, name: str, last: tuple[str, int, Segment] | None) -> tuple[str, int, Segment]:
        descriptor = os.open(self._index.folder / name, os.O_RDONLY)
        try:
            segment = read_header(descriptor, self._index.form)
        except BaseException:
            os.close(descriptor)
            raise
        if last is not None:
            os.close(last[1])
        return name, descriptor, segment

    def _read_block(self, opened: tuple[str, int, Segment], digest: bytes, block: int) -> None:
        _, descriptor, segment = opened
        pieces, complete = self._memory.target(block)
        read_block(descriptor, self._index.form, segment, digest, pieces)
        complete()

    def _lost(self, name: str, error: Exception) -> None:
        """Handle an unusable file."""
        self._index.drop(name)
        if isinstance(error, FileNotFoundError):  # evicted by another process
            return
        log.warning("prefix cache: ignoring %s: %s", self._index.folder / name, error)
        self._stats.errors += 1
        if isinstance(error, SegmentError):
            self._index.discard(name)

    # -- the writer

    def _write(self) -> None:
        try:
            while not self._stop.wait(_PERIOD):
                self._turn()
            self._turn(last=True)
        except Exception:
            log.exception("prefix cache: writing failed; blocks are no longer stored")

    def _turn(self, last: bool = False) -> None:
        """Follow other processes, write runs that are due, and evict."""
        with suppress(OSError):
            self._index.create()  # it may have been removed
            self._index.refresh()
        while self._notes:
            parent, hashes = self._notes.popleft()
            if parent is None:
                self._index.touch(hashes)
            self._collect(parent or b"", hashes)
        now = time.monotonic()
        due = [
            run
            for run in self._runs.values()
            if last or len(run.hashes) >= self._most or now - run.since >= _LINGER
        ]
        for run in due:
            del self._runs[run.hashes[-1]]
            self._queued.difference_update(run.hashes)
        try:
            if now >= self._paused_until:
                for run in due:
                    self._store(run)
                self._make_room(now)
        except OSError as error:
            self._refused(error)

    def _collect(self, parent: bytes, hashes: Sequence[bytes]) -> None:
        """Append blocks that are not stored to the run they continue."""
        for digest in hashes:
            if digest not in self._index and digest not in self._queued:
                run = self._runs.pop(parent, None) or _Run()
                run.hashes.append(digest)
                self._runs[digest] = run
                self._queued.add(digest)
            parent = digest

    def _store(self, run: _Run) -> None:
        began, stats = time.perf_counter(), self._stats
        for first in range(0, len(run.hashes), self._most):
            hashes = run.hashes[first : first + self._most]
            sources = self._sources(hashes)
            written = write_segment(self._index.folder, self._index.form, len(hashes), sources)
            if written is None:
                break
            self._index.add(*written)
            stats.written_bytes += len(written[1]) * self._memory.block_bytes
        stats.write_seconds += time.perf_counter() - began

    def _sources(self, hashes: Sequence[bytes]) -> Iterator[Source]:
        """The blocks still in memory, up to the first missing one."""
        prefix = self._prefix
        for digest in hashes:
            found = prefix.locate(digest)
            if found is None:
                return
            yield Source(digest, self._memory.source(found[0]), partial(self._same, prefix, digest, found))

    def _same(self, prefix: PrefixCache, digest: bytes, found: tuple[int, int]) -> bool:
        return self._prefix is prefix and prefix.locate(digest) == found

    def _make_room(self, now: float) -> None:
        if self._index.stored_bytes > self._index.capacity or now >= self._recount_at:
            self._recount_at = now + _RECOUNT
            self._index.evict()
        self._stats.evictions = self._index.evictions
        self._stats.stored_bytes = self._index.stored_bytes

    def _refused(self, error: OSError) -> None:
        """Handle a full or read-only disk: continue without it and retry later."""
        self._stats.errors += 1
        if not self._warned:
            log.warning(
                "prefix cache: cannot write to %s (%s); continuing without it", self._index.folder, error
            )
        self._warned, self._paused_until = True, time.monotonic() + _PAUSE
