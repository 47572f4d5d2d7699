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
from farthing.engine.sequence import PrefixCache
from farthing.engine.stats import DiskStats
from farthing.lazy import torch
from farthing.ops.api import LatentCache

if TYPE_CHECKING:
    from torch import Tensor


# The bytes of one block over all layers, in file order: latents, their scales, then index keys.
#
# Each tensor is stored layer by layer; MTP layers come last.


class BlockMemory:
    """Blocks of a cache in this process's memory; files are read and written in place."""

    def __init__(self, cache: LatentCache) -> None:
        self._parts = []  # per tensor: memory, bytes of a block, offset of block 0 in each layer
        for tensor in cache.tensors():
            whole = _bytes(tensor)
            layers, blocks = tensor.shape[:2]
            size = len(whole) // (layers * blocks)
            self._parts.append((whole, size, [layer * blocks * size for layer in range(layers)]))
        self.block_bytes = sum(size * len(layers) for _, size, layers in self._parts)

    def source(self, block: int) -> Pieces:
        """The memory of a block to write to a file."""
        return [
            whole[first + block * size : first + (block + 1) * size]
            for whole, size, layers in self._parts
            for first in layers
        ]

    def target(self, block: int) -> tuple[Pieces, Callable[[], None]]:
        """Memory to read a block into, and a function that completes the read."""
        return self.source(block), lambda: None


class DeviceMemory(BlockMemory):
    """Blocks of a cache on an accelerator, copied through host memory.

    The copies are queued on the device's default stream, so they follow the steps launched before them and
    precede those launched after.
    """

    def __init__(self, cache: LatentCache) -> None:
        self._tensors = cache.tensors()
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


def memory_of(cache: LatentCache) -> BlockMemory:
    """The accessor for a cache's blocks, on the host or a device."""
    on_host = isinstance(cache.data, np.ndarray) or cache.data.device.type == "cpu"
    return (BlockMemory if on_host else DeviceMemory)(cache)


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1)
    return (flat if isinstance(flat, np.ndarray) else flat.view(torch.uint8).numpy()).view(np.uint8).data


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
    memory = memory_of(cache)
    form = Format(identity(config, model, cache), memory.block_bytes)
    if config.prefix_cache_disk_bytes < (least := form.segment_bytes(1)):
        raise ValueError(
            f"prefix_cache_disk_bytes: got {config.prefix_cache_disk_bytes}; expected at least {least}, "
            "the size of a file with one block"
        )
    index = Index(Path(config.prefix_cache_dir), form, config.prefix_cache_disk_bytes)
    return DiskStore(index, memory, config.block_size, stats, loaded) if _list(index) else None


def identity(config: EngineConfig, model: Model, cache: LatentCache) -> bytes:
    """A digest of everything that determines a block's contents besides its tokens and salt."""
    packed = () if config.packed is None else (Path(config.packed),)
    parts = (
        VERSION,
        version("farthing"),
        model.ops.source,
        model.ops.name.partition(",")[0],  # without the number of threads
        *(sample(file) for file in (*model.ops.weight_files, *packed)),
        *(config.dtype, config.quantization, config.experts, config.deterministic),
        *(config.experts_on, config.hot_experts),  # results differ between devices
        "mtp" in (config.speculate or ""),  # only then its layer's rows are filled
        *((str(t.dtype), t.shape[0], *t.shape[2:]) for t in cache.tensors()),
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
