"""Cache blocks on disk: files that never change once named, and the index that a host's replicas share."""

from __future__ import annotations

import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import xxhash

VERSION = 1  # of this format and of the order of a block's pieces
HASH_BYTES = 16
TEMPORARY = ".tmp"

_MAGIC = b"FARTHKV\n"
_HEADER = struct.Struct("<8sIIQQ16sQ")
_ENTRY = struct.Struct(f"<{HASH_BYTES}sQ")
_MOST_PIECES = 512  # per system call; Linux accepts 1024

Pieces = Sequence[memoryview]  # a block's memory


class SegmentError(Exception):
    """The file is not a complete segment of this model and format, or a block is damaged."""


@dataclass(frozen=True, slots=True)
class Format:
    """Properties shared by all blocks of a directory."""

    identity: bytes  # 16 bytes: digest of all that determines a block's contents besides its tokens
    block_bytes: int

    def segment_bytes(self, blocks: int) -> int:
        """Size of a file."""
        return _HEADER.size + blocks * (_ENTRY.size + self.block_bytes)


@dataclass(frozen=True, slots=True)
class Segment:
    """The verified header of a file.

        header    56 bytes: magic, version, number of blocks, offset of the blocks, bytes per block,
                  identity of model and cache, checksum of header and table
        table     for each block: its hash (16 bytes), checksum of hash and contents (8 bytes)
        blocks    consecutive, each as its pieces of memory in order

    A reader verifies the header, the identity, the file's length and each block's checksum, so that a torn,
    truncated or foreign file raises an error and is never used as data.
    """

    slots: dict[bytes, int]  # by hash
    checksums: tuple[int, ...]
    offset: int  # of the first block


@dataclass(frozen=True, slots=True)
class Source:
    """A block to write. intact: called after the copy; tells whether the memory was not reused meanwhile."""

    digest: bytes
    pieces: Pieces
    intact: Callable[[], bool]


def write_segment(
    folder: Path, form: Format, most: int, blocks: Iterable[Source]
) -> tuple[str, list[bytes]] | None:
    """Write up to `most` blocks; stop at one whose memory was reused meanwhile.

    Returns the file's name and its blocks' hashes, or None if there are none. Raises OSError.
    """
    partial = folder / f"{uuid4().hex}{TEMPORARY}"
    offset = _HEADER.size + most * _ENTRY.size
    entries: list[tuple[bytes, int]] = []
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for source in blocks:
            checksum = _checksum(source.digest, source.pieces)
            _transfer(os.pwritev, descriptor, source.pieces, offset + len(entries) * form.block_bytes)
            if not source.intact():
                break
            entries.append((source.digest, checksum))
        if not entries:
            return None
        os.ftruncate(descriptor, offset + len(entries) * form.block_bytes)
        _transfer(os.pwritev, descriptor, [memoryview(_head(form, offset, entries))], 0)
        name = file_name([digest for digest, _ in entries])
        partial.rename(folder / name)
    finally:
        os.close(descriptor)
        partial.unlink(missing_ok=True)
    return name, [digest for digest, _ in entries]


def file_name(hashes: Sequence[bytes]) -> str:
    """The same blocks give the same name in every process. The last hash implies those before it."""
    return f"{hashes[-1].hex()}-{len(hashes)}.kv"


def read_header(descriptor: int, form: Format) -> Segment:
    """The table of an open file. Raises SegmentError, OSError."""
    head = os.pread(descriptor, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        raise SegmentError("header is truncated")
    magic, version, count, offset, block_bytes, identity, checksum = _HEADER.unpack(head)
    if magic != _MAGIC or version != VERSION:
        raise SegmentError("unsupported file version")
    if identity != form.identity or block_bytes != form.block_bytes:
        raise SegmentError("blocks of another model or cache")
    if not count or offset < _HEADER.size + count * _ENTRY.size:
        raise SegmentError("header is damaged")
    if os.fstat(descriptor).st_size != offset + count * block_bytes:
        raise SegmentError("file is truncated")
    table = os.pread(descriptor, count * _ENTRY.size, _HEADER.size)
    if _head_checksum(form, offset, count, table) != checksum:
        raise SegmentError("header is damaged")
    entries = list(_ENTRY.iter_unpack(table))
    slots = {digest: slot for slot, (digest, _) in enumerate(entries)}
    return Segment(slots, tuple(checksum for _, checksum in entries), offset)


def read_block(descriptor: int, form: Format, segment: Segment, digest: bytes, pieces: Pieces) -> None:
    """Read a block into its memory. On SegmentError or OSError the memory is undefined."""
    slot = segment.slots.get(digest)
    if slot is None:
        raise SegmentError("a listed block is missing")
    _transfer(os.preadv, descriptor, pieces, segment.offset + slot * form.block_bytes)
    if _checksum(digest, pieces) != segment.checksums[slot]:
        raise SegmentError("a block's checksum does not match")


def _head(form: Format, offset: int, entries: Sequence[tuple[bytes, int]]) -> bytes:
    table = b"".join(_ENTRY.pack(*entry) for entry in entries)
    checksum = _head_checksum(form, offset, len(entries), table)
    return _pack(form, offset, len(entries), checksum) + table


def _head_checksum(form: Format, offset: int, count: int, table: bytes) -> int:
    return xxhash.xxh3_64_intdigest(_pack(form, offset, count, 0) + table)


def _pack(form: Format, offset: int, count: int, checksum: int) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, count, offset, form.block_bytes, form.identity, checksum)


def _checksum(digest: bytes, pieces: Pieces) -> int:
    state = xxhash.xxh3_64(digest)
    for piece in pieces:
        state.update(piece)
    return state.intdigest()


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int], descriptor: int, pieces: Pieces, offset: int
) -> None:
    """Read or write all pieces, repeating partial system calls."""
    rest = list(pieces)
    while rest:
        done = call(descriptor, rest[:_MOST_PIECES], offset)
        if done <= 0:
            raise SegmentError("file is truncated")
        offset += done
        whole = 0
        while whole < len(rest) and done >= len(rest[whole]):
            done -= len(rest[whole])
            whole += 1
        rest = rest[whole:]
        if done:
            rest[0] = rest[0][done:]


_FILE = re.compile(r"[0-9a-f]{32}-[0-9]+\.kv")
_FOLDER = re.compile(r"[0-9a-f]{32}")
_ABANDONED_S = 600.0  # a temporary file this old belongs to a process that was killed
_LOW_WATER = 0.95  # share of the capacity that remains after eviction


class Index:
    """Maps blocks to files. `find` may be called from any thread; one thread refreshes and evicts.

    Files are created by renaming, removed by unlinking, and never changed. A reader therefore needs no lock:
    an open file stays valid, and a removed file is a miss. Each process keeps a table of known files and
    lists the directory again when it changes.

    The least recently used files are evicted first. A file's modification time is its last use. Within a
    chain of blocks later blocks get older times, so that the end of a chain is evicted before its beginning.
    """

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
