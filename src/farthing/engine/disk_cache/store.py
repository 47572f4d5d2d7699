"""The engine's side of the disk cache: reads and writes blocks in the background.

The engine's thread only appends to queues. The writer looks up blocks by hash when it reaches them and
copies them without holding a reference. It compares the block's reallocation count before and after the
copy and drops the copy if the count changed. A block is therefore lost if memory is reused faster than the
disk writes, and no step ever waits. Runs of consecutive blocks become files.
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
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from farthing.config import EngineConfig
from farthing.engine.disk_cache.files import (
    VERSION,
    Format,
    Index,
    Pieces,
    Segment,
    SegmentError,
    Source,
    read_block,
    read_header,
    write_segment,
)
from farthing.engine.prefetch import Load
from farthing.engine.runner import Model
from farthing.engine.sequence import Known
from farthing.engine.stats import DiskStats
from farthing.lazy import torch
from farthing.ops.api import LatentCache

if TYPE_CHECKING:
    from torch import Tensor


class BlockMemory:
    """Blocks (or slots) of a cache in this process's memory; files are read and written in place.

    Each tensor is stored layer by layer; MTP layers come last.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: [layers, blocks, …], of which some are part of a larger one: a layer is contiguous."""
        self._layers = []  # memory, bytes of a block
        for layer in (layer for tensor in tensors for layer in tensor):
            flat: Any = layer if isinstance(layer, np.ndarray) else layer.view(-1)  # never a copy
            whole = _bytes(flat)
            self._layers.append((whole, len(whole) // max(1, len(layer))))
        self.block_bytes = sum(size for _, size in self._layers)

    def source(self, block: int) -> Pieces:
        """The memory of a block to write to a file."""
        return [whole[block * size : (block + 1) * size] for whole, size in self._layers]

    def target(self, block: int) -> tuple[Pieces, Callable[[], None]]:
        """Memory to read a block into, and a function that completes the read."""
        return self.source(block), lambda: None


class DeviceMemory(BlockMemory):
    """Blocks of a cache on an accelerator, copied through host memory.

    The copies are queued on the device's default stream, so they follow the steps launched before them and
    precede those launched after.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.block_bytes = sum(t[:, 0].numel() * t.element_size() for t in self._tensors)

    def source(self, block: int) -> Pieces:
        """See `BlockMemory`."""
        return [_bytes(t[:, block].cpu()) for t in self._tensors]

    def target(self, block: int) -> tuple[Pieces, Callable[[], None]]:
        """See `BlockMemory`."""
        hosts = [torch.empty(t[:, block].shape, dtype=t.dtype) for t in self._tensors]

        def complete() -> None:
            for tensor, host in zip(self._tensors, hosts, strict=True):
                tensor[:, block] = host.to(tensor.device)

        return [_bytes(host) for host in hosts], complete


def memory_of(tensors: Sequence[Tensor]) -> BlockMemory:
    """The accessor for the blocks of tensors on the host or a device."""
    on_host = isinstance(tensors[0], np.ndarray) or tensors[0].device.type == "cpu"
    return (BlockMemory if on_host else DeviceMemory)(tensors)


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1)
    return (flat if isinstance(flat, np.ndarray) else flat.view(torch.uint8).numpy()).view(np.uint8).data


log = logging.getLogger(__name__)

SEGMENT_BYTES = 32 << 20  # largest file; docs/lab/prefix-caches.md compares sizes
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


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file that is being read."""

    shelf: Shelf
    name: str
    descriptor: int
    segment: Segment

    def read(self, digest: bytes, block: int) -> None:
        """Read a block into memory."""
        pieces, complete = self.shelf.memory.target(block)
        read_block(self.descriptor, self.shelf.index.form, self.segment, digest, pieces)
        complete()


def _open(shelf: Shelf, name: str, last: _Opened | None) -> _Opened:
    descriptor = os.open(shelf.index.folder / name, os.O_RDONLY)
    try:
        opened = _Opened(shelf, name, descriptor, read_header(descriptor, shelf.index.form))
    except BaseException:
        os.close(descriptor)
        raise
    if last is not None:
        os.close(last.descriptor)
    return opened


class Shelf:
    """The blocks of one kind: a directory, the memory, and the table that finds blocks in it."""

    def __init__(self, index: Index, memory: BlockMemory) -> None:
        self.index, self.memory, self.known = index, memory, Known()
        self.runs: dict[bytes, _Run] = {}  # by their last hash
        self.queued: set[bytes] = set()  # blocks of all runs
        self.most = max(1, min(SEGMENT_BYTES, index.capacity // 16) // max(1, memory.block_bytes))

    def collect(self, parent: bytes, hashes: Sequence[bytes]) -> None:
        """Append blocks that are not stored to the run they continue."""
        for digest in hashes:
            if digest not in self.index and digest not in self.queued:
                run = self.runs.pop(parent, None) or _Run()
                run.hashes.append(digest)
                self.runs[digest] = run
                self.queued.add(digest)
            parent = digest

    def due(self, last: bool, now: float) -> list[_Run]:
        """Remove and return the runs to write now."""
        found = [
            run
            for run in self.runs.values()
            if last or len(run.hashes) >= self.most or now - run.since >= _LINGER
        ]
        for run in found:
            del self.runs[run.hashes[-1]]
            self.queued.difference_update(run.hashes)
        return found

    def sources(self, hashes: Sequence[bytes]) -> Iterator[Source]:
        """The blocks still in memory, up to the first missing one."""
        known = self.known
        for digest in hashes:
            found = known.locate(digest)
            if found is None:
                return
            yield Source(digest, self.memory.source(found[0]), partial(self._same, known, digest, found))

    def _same(self, known: Known, digest: bytes, found: tuple[int, int]) -> bool:
        return self.known is known and known.locate(digest) == found


class DiskStore:
    """A `BlockStore` over a directory for each kind."""

    def __init__(
        self,
        shelves: Sequence[Shelf],
        block_size: int,
        stats: DiskStats,
        loaded: Callable[[Load[Any], int], None],
    ) -> None:
        """loaded: called in the reader's thread with a load and its number of filled blocks."""
        self._shelves, self._block_size = shelves, block_size
        self._stats, self._loaded = stats, loaded
        stats.stored_bytes = max(shelf.index.stored_bytes for shelf in shelves)
        self._notes: deque[tuple[int, bytes | None, list[bytes]]] = deque(maxlen=_MOST_QUEUED)
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

    @property
    def folder(self) -> Path:
        """The directory of the blocks; its name identifies model and cache."""
        return self._shelves[0].index.folder

    # -- the engine's thread

    def attach(self, known: Sequence[Known]) -> None:
        """See `BlockStore`."""
        for shelf, each in zip(self._shelves, known, strict=True):
            shelf.known = each

    def find(self, hashes: Sequence[bytes], kind: int = 0) -> int:
        """See `BlockStore`."""
        return self._shelves[kind].index.find(hashes)

    def read(self, load: Load[Any]) -> None:
        """See `BlockStore`."""
        self._loads.put(load)

    def computed(self, parent: bytes, hashes: list[bytes], kind: int = 0) -> None:
        """See `BlockStore`."""
        self._notes.append((kind, parent, hashes))

    def used(self, hashes: list[bytes]) -> None:
        """See `BlockStore`."""
        self._notes.append((0, None, hashes))

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
        began, good, shelf = time.perf_counter(), 0, self._shelves[0]
        opened: _Opened | None = None
        try:
            for kind, digest, block in load.entries:
                shelf = self._shelves[kind]
                while name := shelf.index.file_of(digest):
                    try:
                        if opened is None or (opened.shelf, opened.name) != (shelf, name):
                            opened = _open(shelf, name, opened)
                        opened.read(digest, block)
                        break
                    except (SegmentError, OSError) as error:
                        self._lost(shelf, name, error)
                else:
                    break
                good += 1
                self._stats.hits += 0 if kind else self._block_size
                self._stats.read_bytes += shelf.memory.block_bytes
        finally:
            if opened is not None:
                os.close(opened.descriptor)
        self._stats.read_seconds += time.perf_counter() - began
        return good

    def _lost(self, shelf: Shelf, name: str, error: Exception) -> None:
        """Handle an unusable file."""
        shelf.index.drop(name)
        if isinstance(error, FileNotFoundError):  # evicted by another process
            return
        log.warning("prefix cache: ignoring %s: %s", shelf.index.folder / name, error)
        self._stats.errors += 1
        if isinstance(error, SegmentError):
            shelf.index.discard(name)

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
        for shelf in self._shelves:
            with suppress(OSError):
                shelf.index.create()  # it may have been removed
                shelf.index.refresh()
        while self._notes:
            kind, parent, hashes = self._notes.popleft()
            if parent is None:
                for shelf in self._shelves:
                    shelf.index.touch(hashes)
            self._shelves[kind].collect(parent or b"", hashes)
        now = time.monotonic()
        due = [(shelf, run) for shelf in self._shelves for run in shelf.due(last, now)]
        try:
            if now >= self._paused_until:
                for shelf, run in due:
                    self._store(shelf, run)
                self._make_room(now)
        except OSError as error:
            self._refused(error)

    def _store(self, shelf: Shelf, run: _Run) -> None:
        began, stats = time.perf_counter(), self._stats
        for first in range(0, len(run.hashes), shelf.most):
            hashes = run.hashes[first : first + shelf.most]
            sources = shelf.sources(hashes)
            written = write_segment(shelf.index.folder, shelf.index.form, len(hashes), sources)
            if written is None:
                break
            shelf.index.add(*written)
            stats.written_bytes += len(written[1]) * shelf.memory.block_bytes
        stats.write_seconds += time.perf_counter() - began

    def _make_room(self, now: float) -> None:
        """Evict; an index counts the directories of all kinds, but knows the files of its own only."""
        full = any(shelf.index.stored_bytes > shelf.index.capacity for shelf in self._shelves)
        if full or now >= self._recount_at:
            self._recount_at = now + _RECOUNT
            for shelf in self._shelves:
                shelf.index.evict()
        self._stats.evictions = sum(shelf.index.evictions for shelf in self._shelves)
        self._stats.stored_bytes = max(shelf.index.stored_bytes for shelf in self._shelves)

    def _refused(self, error: OSError) -> None:
        """Handle a full or read-only disk: continue without it and retry later."""
        self._stats.errors += 1
        if not self._warned:
            folder = self._shelves[0].index.folder
            log.warning("prefix cache: cannot write to %s (%s); continuing without it", folder, error)
        self._warned, self._paused_until = True, time.monotonic() + _PAUSE


# Opens the store described by the engine's configuration.

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # read of each weight file


def open_store(
    config: EngineConfig,
    model: Model,
    cache: LatentCache,
    stats: DiskStats,
    loaded: Callable[[Load[Any], int], None],
) -> DiskStore | None:
    """The store of `prefix_cache_dir`; None without one, or if the directory cannot be used.

    Raises ValueError if the path is not a directory, not even one block fits in the limit, or the model's
    blocks cannot be identified.
    """
    if config.prefix_cache_dir is None:
        return None
    if not model.ops.source:
        raise ValueError(
            f"prefix_cache_dir: got {config.prefix_cache_dir!r} for a model that was not loaded from a "
            "checkpoint; expected a checkpoint, which identifies the blocks"
        )
    shelves = []
    for kind, tensors in enumerate(cache.by_kind()):
        memory = memory_of(tensors)
        form = Format(identity(config, model, tensors, kind), memory.block_bytes)
        if config.prefix_cache_disk_bytes < (least := form.segment_bytes(1)):
            raise ValueError(
                f"prefix_cache_disk_bytes: got {config.prefix_cache_disk_bytes}; expected at least {least}, "
                "the size of a file with one block"
            )
        index = Index(Path(config.prefix_cache_dir), form, config.prefix_cache_disk_bytes)
        shelves.append(Shelf(index, memory))
    usable = all(_list(shelf.index) for shelf in shelves)
    return DiskStore(shelves, config.block_size, stats, loaded) if usable else None


def identity(config: EngineConfig, model: Model, tensors: Sequence[Tensor], kind: int = 0) -> bytes:
    """A digest of everything that determines a block's contents besides its tokens and salt."""
    packed = () if config.packed is None else (Path(config.packed),)
    parts = (
        VERSION,
        version("farthing"),
        model.ops.source,
        model.ops.name.partition(",")[0],  # without the number of threads
        *(sample(file) for file in (*model.ops.weight_files, *packed)),
        *(config.dtype, config.exact, config.quantization, config.experts, config.deterministic),
        *(config.experts_on, config.hot_experts),  # results differ between devices
        "mtp" in (config.speculate or ""),  # only then its layer's rows are filled
        kind,
        *((str(t.dtype), t.shape[0], *t.shape[2:]) for t in tensors),
    )
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def sample(file: Path) -> bytes:
    """A digest of a file's size, its modification time, and evenly spaced parts from beginning to end."""
    status = file.stat()
    digest = blake2b(repr((status.st_size, status.st_mtime_ns)).encode(), digest_size=16)
    last = max(0, status.st_size - _SAMPLE_BYTES)
    with file.open("rb", buffering=0) as stream:
        for i in range(_SAMPLES):
            stream.seek(last * i // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()


def _list(index: Index) -> bool:
    """Create and list the directory. Returns False, with a warning, if it is unusable."""
    try:
        index.create()
        index.refresh()
        index.evict()
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"prefix_cache_dir: got {str(index.root)!r}; expected a directory") from None
    except OSError as error:
        if not index.folder.is_dir():
            log.warning("prefix cache: cannot use %s (%s); continuing without it", index.root, error.strerror)
            return False
    log.info(
        "prefix cache: %d blocks in %s, %.1f of %.1f GB used",
        *(len(index), index.folder, index.stored_bytes / 1e9, index.capacity / 1e9),
    )
    return True
