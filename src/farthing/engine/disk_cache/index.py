"""The directory of stored blocks, shared by the replicas of a host.

Files are created by renaming, removed by unlinking, and never changed. A reader therefore needs no lock: an
open file stays valid, and a removed file is a miss. Each process keeps a table of known files and lists the
directory again when it changes.

The least recently used files are evicted first. A file's modification time is its last use. Within a chain of
blocks later blocks get older times, so that the end of a chain is evicted before its beginning.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from farthing.engine.disk_cache.segment import TEMPORARY, Format, SegmentError, read_header

_FILE = re.compile(r"[0-9a-f]{32}-[0-9]+\.kv")
_FOLDER = re.compile(r"[0-9a-f]{32}")
_ABANDONED_S = 600.0  # a temporary file this old belongs to a process that was killed
_LOW_WATER = 0.95  # share of the capacity that remains after eviction


class Index:
    """Maps blocks to files. `find` may be called from any thread; one thread refreshes and evicts."""

    def __init__(self, root: Path, form: Format, capacity: int) -> None:
        """root: has one directory per identity. capacity: bytes of all of them together."""
        self.root, self.form, self.capacity = root, form, capacity
        self.folder = root / form.identity.hex()
        self.stored_bytes = 0  # of all directories: the last count plus additions since
        self.evictions = 0  # files that this process removed
        self._files: dict[str, tuple[bytes, ...]] = {}
        self._holders: dict[bytes, list[str]] = {}  # files by block
        self._seen_at = -1  # modification time of the folder when it was listed
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._holders)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._holders

    def find(self, hashes: Sequence[bytes]) -> int:
        """Number of leading blocks that are stored."""
        for count, digest in enumerate(hashes):
            if digest not in self._holders:
                return count
        return len(hashes)

    def file_of(self, digest: bytes) -> str | None:
        """Name of a file with the block."""
        with self._lock:
            holders = self._holders.get(digest)
            return holders[0] if holders else None

    def create(self) -> None:
        """Create the directory if it is missing. Raises OSError."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def refresh(self) -> None:
        """List the directory if it has changed. Raises OSError."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._seen_at:
            return
        # The next listing must detect a change within the clock's granularity of this one.
        self._seen_at = changed if time.time_ns() - changed > 1_000_000_000 else -1
        present = {entry.name for entry in os.scandir(self.folder) if _FILE.fullmatch(entry.name)}
        for name in self._files.keys() - present:
            self.drop(name)
        for name in present - self._files.keys():
            self._open(name)

    def add(self, name: str, hashes: Sequence[bytes]) -> None:
        """Record a file that was written."""
        with self._lock:
            if name in self._files:
                return
            self._files[name] = tuple(hashes)
            self.stored_bytes += self.form.segment_bytes(len(hashes))
            for digest in hashes:
                self._holders.setdefault(digest, []).append(name)

    def drop(self, name: str) -> None:
        """Forget a file that was removed."""
        with self._lock:
            for digest in self._files.pop(name, ()):
                self._holders[digest].remove(name)
                if not self._holders[digest]:
                    del self._holders[digest]

    def discard(self, name: str) -> None:
        """Remove a damaged file."""
        self.drop(name)
        with suppress(OSError):
            (self.folder / name).unlink()

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Mark a chain of blocks as used now; the first file becomes the most recent."""
        with self._lock:
            names = dict.fromkeys(name for digest in hashes for name in self._holders.get(digest, ())[:1])
        now = time.time_ns() - len(names)
        for later, name in enumerate(reversed(names)):
            with suppress(OSError):  # evicted by another process, or the disk is read-only
                os.utime(self.folder / name, ns=(now + later, now + later))

    def evict(self) -> None:
        """Remove the least recently used files of all identities if they exceed the capacity.

        Two processes that evict at once select the same files. Raises OSError.
        """
        files = sorted(self._all_files())
        self.stored_bytes = sum(size for _, size, _ in files)
        if self.stored_bytes <= self.capacity:
            return
        for _, size, path in files:
            if self.stored_bytes <= self.capacity * _LOW_WATER:
                break
            with suppress(FileNotFoundError):
                path.unlink()
                self.evictions += 1
            if path.parent == self.folder:
                self.drop(path.name)
            self.stored_bytes -= size

    def _all_files(self) -> Iterator[tuple[int, int, Path]]:
        """Last use, size and path of every segment; removes incomplete files of killed processes."""
        abandoned = time.time_ns() - int(_ABANDONED_S * 1e9)
        for folder in [e.path for e in os.scandir(self.root) if _FOLDER.fullmatch(e.name) and e.is_dir()]:
            for entry in os.scandir(folder):
                temporary = entry.name.endswith(TEMPORARY)
                if not (temporary or _FILE.fullmatch(entry.name)):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if temporary and status.st_mtime_ns < abandoned:
                        Path(entry.path).unlink()
                    elif not temporary:
                        yield status.st_mtime_ns, status.st_size, Path(entry.path)

    def _open(self, name: str) -> None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except OSError:
            return
        try:
            self.add(name, tuple(read_header(descriptor, self.form).slots))
        except SegmentError:
            self.discard(name)
        finally:
            os.close(descriptor)
