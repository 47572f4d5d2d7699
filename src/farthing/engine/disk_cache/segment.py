"""A file of cache blocks. It is written under a temporary name, renamed, and never changed afterwards.

    header    56 bytes: magic, version, number of blocks, offset of the blocks, bytes per block, identity of
              model and cache, checksum of header and table
    table     for each block: its hash (16 bytes), checksum of hash and contents (8 bytes)
    blocks    consecutive, each as its pieces of memory in order

A reader verifies the header, the identity, the file's length and each block's checksum, so that a torn,
truncated or foreign file raises an error and is never used as data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
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
    """The verified header of a file."""

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
