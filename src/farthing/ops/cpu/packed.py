"""Packed weights in one mapped file: written part by part, and ready as soon as its pages are touched."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from farthing import _native, files
from farthing.config import Quantization
from farthing.files import BeingWritten
from farthing.ops.weights import InputRounding, measured_for

log = logging.getLogger(__name__)

MAGIC = b"FARTHPK2"
VERSION = 2
PAGE = 4096
HEADER = struct.Struct("<8sQQQ32x")
DTYPES = {name: np.dtype(name) for name in ("float32", "int64")}
CHECKED_AT_ONCE = 8 << 20  # bytes
CHECKED_PER_SECOND = 1 << 30  # bytes/s of the background thread: a small share of memory bandwidth


class DamagedFile(RuntimeError):
    """A checksum of a packed file that is in use does not match."""


def name_hash(name: str) -> int:
    """A 64-bit hash of a section's name."""
    return xxhash.xxh3_64_intdigest(name.encode())


class PackedFile:
    """A packed file, mapped read-only. `quantization`: the rounding of the weights, or None.

    Raises ValueError if the file is not a complete packed file of this version.

    Layout: 64 bytes (magic, offset, length and checksum of the index), sections at multiples of 4096, the
    index as JSON: `{"version", "quantization", "source", "isa", "entries": {name: {"offset", "bytes",
    "checksum"[, "dtype", "shape"][, "sparse"]}}}`. An entry with a dtype is a plain array; one without is a
    packed matrix as pack.cpp writes it. `source` is the fingerprint of the checkpoint that was packed,
    `isa` the key of `COSTS` (ops/weights.py) that decided which matrices are `sparse`, that is, stored
    without their zero blocks.

    The file is not trusted. The index is checked when the file is opened, the structure of a matrix when it
    is mapped (pack.cpp). Checksums are XXH3-64, seeded with the name of the section, so that sections
    that changed places are found too; a background thread compares them at a bounded rate, `verify` all at
    once.

    The mapping requests large pages, which file systems with large folios (ext4 since Linux 6.16, xfs, btrfs)
    provide for data first read through the mapping: a process then maps a gigabyte in milliseconds, and a
    step reads it faster, because translation and prefetching do not stop at every 4 KB. Pages cached by
    writing stay small, so the writer drops them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.damage: str | None = None  # found by the background check
        if not path.is_file():
            raise ValueError(f"packed file {str(path)!r} does not exist; write it with --pack")
        size = path.stat().st_size
        if size < HEADER.size:
            raise ValueError(f"packed file {str(path)!r} is cut off: {size} bytes")
        self._map = _mapped(path)
        magic, offset, length, checksum = HEADER.unpack(self._map[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError(
                f"{str(path)!r} is not a packed file of this version "
                f"(its first bytes are {magic!r}, not {MAGIC!r}); pack the model again"
            )
        if (whole := offset + length) != size:
            wrong = "is cut off" if size < whole else "has bytes after its end"
            raise ValueError(
                f"packed file {str(path)!r} {wrong}: {size} bytes, expected {whole}; copy or pack it again"
            )
        text = self._map[offset:].tobytes()
        if xxhash.xxh3_64_intdigest(text) != checksum:
            raise ValueError(f"packed file {str(path)!r}: its index is damaged; pack the model again")
        try:
            self._read_index(json.loads(text), offset)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"packed file {str(path)!r}: its index is damaged ({error!r})") from None
        self._address = self._map.ctypes.data
        self._stop = threading.Event()

    def _read_index(self, index: dict[str, Any], end: int) -> None:
        if index["version"] != VERSION:
            raise ValueError(f"version {index['version']!r}; expected {VERSION}")
        self.quantization: str | None = index["quantization"]
        if self.quantization not in (None, *get_args(Quantization)):
            raise ValueError(f"quantization {self.quantization!r}")
        self.source: str = str(index.get("source", ""))
        self._isa: str = str(index.get("isa", ""))
        self._entries: dict[str, dict[str, Any]] = index["entries"]
        for name, entry in self._entries.items():
            offset, size, checksum = entry["offset"], entry["bytes"], entry["checksum"]
            if not all(type(v) is int for v in (offset, size, checksum)):
                raise ValueError(f"entry {name!r} has no integer offset, bytes and checksum")
            if offset % PAGE or not PAGE <= offset <= offset + size <= end or size < 1:
                raise ValueError(f"entry {name!r}: bytes {offset} to {offset + size} of {end}")
            if "dtype" in entry:
                shape = entry["shape"]
                if any(type(n) is not int or n < 0 for n in shape):
                    raise ValueError(f"entry {name!r}: shape {shape}")
                if prod(shape) * DTYPES[entry["dtype"]].itemsize != size:
                    raise ValueError(f"entry {name!r}: {size} bytes for shape {shape}")
            if "inputs" in entry:
                bits, clip, scale = entry["inputs"]
                static = scale is None or (type(scale) is float and 0 < scale < math.inf)
                if type(bits) is not int or not 2 <= bits <= 8 or not 0 < clip <= 1 or not static:
                    raise ValueError(f"entry {name!r}: inputs {bits}, {clip}, {scale}")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def sparse_for(self) -> str | None:
        """The key of `COSTS` by which block-sparse matrices were chosen; None if there are none."""
        return self._isa if any(entry.get("sparse") for entry in self._entries.values()) else None

    def matrix(self, name: str) -> tuple[int, int, int]:
        """(address, bytes, hash of the name) of a packed matrix."""
        entry = self._entries[name]
        if "dtype" in entry:
            raise ValueError(f"packed file {str(self.path)!r}: {name!r} is a plain array; expected a matrix")
        return self._address + entry["offset"], entry["bytes"], name_hash(name)

    def array(self, name: str) -> NDArray[Any]:
        """A plain array, copied out; its checksum is compared at once."""
        entry = self._entries[name]
        if "dtype" not in entry:
            raise ValueError(f"packed file {str(self.path)!r}: {name!r} is a matrix; expected a plain array")
        if not self._matches(name):
            raise ValueError(self._mismatch(name))
        raw = self._map[entry["offset"] : entry["offset"] + entry["bytes"]].copy()
        return raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def inputs(self, name: str) -> InputRounding | None:
        """Input rounding of a packed matrix: coarser than 8 bits, or with a calibrated scale."""
        stored = self._entries[name].get("inputs")
        return None if stored is None else InputRounding(*stored)

    # -- checksums

    def verify(self) -> None:
        """Verify every checksum. Raises ValueError naming the first section that does not match."""
        for name in self._entries:
            if not self._matches(name):
                raise ValueError(self._mismatch(name))

    def check_in_background(self) -> None:
        """Verify every checksum in a daemon thread; `raise_damage` reports the result."""
        threading.Thread(target=self._check, name="packed-file-check", daemon=True).start()

    def raise_damage(self) -> None:
        """Raises DamagedFile once the background check has found damage."""
        if self.damage is not None:
            raise DamagedFile(self.damage)

    def close(self) -> None:
        """Stop the background check."""
        self._stop.set()

    def _check(self) -> None:
        for name in self._entries:
            if self._stop.is_set():
                return
            if not self._matches(name, CHECKED_PER_SECOND):
                self.damage = self._mismatch(name)
                log.error("%s", self.damage)
                return

    def _matches(self, name: str, rate: int | None = None) -> bool:
        entry = self._entries[name]
        begin, end = entry["offset"], entry["offset"] + entry["bytes"]

        def parts() -> Iterator[Any]:
            for at in range(begin, end, CHECKED_AT_ONCE):
                part = self._map[at : min(at + CHECKED_AT_ONCE, end)]
                yield part.data
                if rate is not None:
                    time.sleep(part.nbytes / rate)

        return bool(section_checksum(name, parts()) == entry["checksum"])

    def _mismatch(self, name: str) -> str:
        return (
            f"packed file {str(self.path)!r}: the checksum of {name!r} does not match; pack the model again"
        )


def section_checksum(name: str, parts: Iterable[Any]) -> int:
    """The checksum of a section, from its bytes in parts."""
    digest = xxhash.xxh3_64(seed=name_hash(name))
    for part in parts:
        digest.update(part)
    return int(digest.intdigest())


def _mapped(path: Path) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with suppress(AttributeError, OSError):  # systems without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def drop_cached(file: BinaryIO) -> None:
    """Flush the written data to disk and drop its pages from the page cache."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_packed(
    path: str | Path,
    quantization: str | None,
    blobs: Iterable[tuple[str, Any]],
    source: str = "",
    inputs: Mapping[str, InputRounding] | None = None,
    isa: str = "",
) -> None:
    """Write (name, packed matrix or tensor) pairs; the file appears only once complete."""
    head = head_of(quantization, source, isa)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            _write(file, blobs, head, inputs or {})
            drop_cached(file)

    files.replace(Path(path), write)


def head_of(quantization: str | None, source: str, isa: str) -> dict[str, Any]:
    """The fields of the index besides its entries; isa: of the kernels that the file is packed for."""
    return {
        "version": VERSION,
        "quantization": quantization,
        "source": source,
        "isa": measured_for(isa) if isa else "",
    }


def _write(
    file: BinaryIO,
    blobs: Iterable[tuple[str, Any]],
    head: dict[str, Any],
    inputs: Mapping[str, InputRounding],
) -> None:
    file.write(bytes(PAGE))
    entries = {name: write_section(file, name, blob, inputs.get(name)) for name, blob in blobs}
    close_index(file, head | {"entries": entries})


def write_section(file: BinaryIO, name: str, blob: Any, coarse: InputRounding | None) -> dict[str, Any]:
    """Append a packed matrix or an array; returns its index entry."""
    offset, entry = file.tell(), dict[str, Any]()
    if hasattr(blob, "dtype"):
        plain = np.ascontiguousarray(blob)
        data = plain.reshape(-1).view(np.uint8)
        entry = {"dtype": plain.dtype.name, "shape": list(plain.shape)}
    else:
        data = np.zeros(blob.serialized_bytes, dtype=np.uint8)  # padding too is the same in every file
        blob.serialize(data.ctypes.data, name_hash(name))
        if coarse:
            entry = {"inputs": [coarse.bits, coarse.clip, coarse.scale]}
        if blob.sparse:
            entry["sparse"] = True
    checksum = section_checksum(name, [data.data])
    file.write(data.data)
    file.write(bytes(-file.tell() % PAGE))
    return entry | {"offset": offset, "bytes": data.nbytes, "checksum": checksum}


def close_index(file: BinaryIO, index: dict[str, Any]) -> None:
    """Append the index, then write the header, which makes the file valid."""
    offset = file.tell()
    text = json.dumps(index).encode()
    file.write(text)
    file.flush()
    file.seek(0)
    file.write(HEADER.pack(MAGIC, offset, len(text), xxhash.xxh3_64_intdigest(text)))


class PackedWriter:
    """Writes `target`; use it with `with`, then call `finish`.

    A thread writes each part while the next one is packed; at most two parts are in memory. Sections go to
    `TARGET.partial`, and after each part a line with their index entries to `TARGET.parts`, once the data is
    on disk. A killed run resumes after its last complete part. The file gets its magic number and its name
    only when it is complete, so an unfinished one is never served. A resumed run compares the checksums of
    what it found and packs again from the first part that is damaged. A lock on `TARGET.partial` keeps a
    second process out.
    """

    def __init__(self, target: Path, quantization: str | None, source: str) -> None:
        """Resumes an unfinished file of the same checkpoint, quantization and ISA; replaces another one.

        Raises ValueError if `target` is a directory, BeingWritten if another process is packing it.
        """
        if target.is_dir():
            raise ValueError(f"packed file {target} is a directory; expected the name of a file")
        self._target = target
        self._partial, self._parts = (
            target.with_name(f"{target.name}.{end}") for end in ("partial", "parts")
        )
        self._head = head_of(quantization, source, _native.instruction_sets().split()[0])
        self._entries: dict[str, dict[str, Any]] = {}
        self._done: set[str] = set()
        self._file: BinaryIO = self._claimed()
        end = self._resumed()
        self._names = set(self._entries)
        self._file.truncate(end or PAGE)
        self._file.seek(0, os.SEEK_END)
        self._log = self._parts.open("a" if end else "w", encoding="utf-8")
        if not end:
            self._append(self._head)
        self._thread = ThreadPoolExecutor(1, "packed-file-writer")
        self._written: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()
        with suppress(OSError):  # of data whose write has failed before, or that no line of the log counts
            self._file.close()
        self._log.close()

    def __contains__(self, part: object) -> bool:
        return part in self._done

    def add(
        self, part: str, blobs: Iterable[tuple[str, Any]], inputs: Mapping[str, InputRounding] | None = None
    ) -> None:
        """Write one part in the background, after the previous one, whose errors are raised here.

        Raises ValueError for a name that was written before.
        """
        named = list(blobs)
        for name, _ in named:
            if name in self._names:
                raise ValueError(f"weight name {name!r} was packed twice; expected every name once")
            self._names.add(name)
        self._wait()
        self._done.add(part)
        self._written = self._thread.submit(self._write, part, named, inputs or {})

    def _write(self, part: str, blobs: list[tuple[str, Any]], inputs: Mapping[str, InputRounding]) -> None:
        """Write one part and make it durable."""
        with self._named():
            entries = {name: write_section(self._file, name, blob, inputs.get(name)) for name, blob in blobs}
            drop_cached(self._file)
        self._append({"part": part, "end": self._file.tell(), "entries": entries})
        self._entries |= entries

    def _wait(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def finish(self) -> None:
        """Write the index and give the file its name. Raises the errors of the last part."""
        self._wait()
        with self._named():
            close_index(self._file, self._head | {"entries": self._entries})
            drop_cached(self._file)
        self._partial.replace(self._target)
        self._parts.unlink()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the file in errors of writing to it."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._partial)
            raise

    def _append(self, line: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        os.fsync(self._log.fileno())

    def _claimed(self) -> BinaryIO:
        """`TARGET.partial`, opened, created if missing, and locked until it is closed."""
        file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BeingWritten(
                f"{self._target}: another process is packing it; expected one at a time"
            ) from None
        if self._partial.exists() and os.path.samestat(os.fstat(file.fileno()), self._partial.stat()):
            return file
        file.close()  # it became the target of a process that has just finished
        return self._claimed()

    def _resumed(self) -> int:
        """Read what an unfinished run recorded; the end of its last part, 0 if there is nothing to resume."""
        if not self._parts.is_file():
            return 0
        end = 0
        with self._parts.open(encoding="utf-8", errors="replace") as file:
            if _parsed(file.readline()) != self._head:
                return 0
            for text in file:
                line = _parsed(text)
                if not _is_part(line):  # cut off by the kill, or damaged
                    break
                if (damaged := self._damaged(line)) is not None:
                    log.warning(
                        "%s: %r is damaged; packing again from %s", self._partial, damaged, line["part"]
                    )
                    break
                self._entries |= line["entries"]
                self._done.add(line["part"])
                end = line["end"]
        if end:
            self._drop_after_last_part()
        return end

    def _damaged(self, line: Mapping[str, Any]) -> str | None:
        """The first section of a recorded part that is not in the file as it was written."""
        for name, entry in line["entries"].items():
            try:
                self._file.seek(entry["offset"])
                data = _chunks(self._file, entry["bytes"])
                if section_checksum(name, data) != entry["checksum"]:
                    return str(name)
            except (KeyError, TypeError, ValueError, OSError):
                return str(name)
        return None if line["end"] <= self._file.seek(0, os.SEEK_END) else "its end"

    def _drop_after_last_part(self) -> None:
        lines = self._parts.read_text(encoding="utf-8", errors="replace").splitlines()[: 1 + len(self._done)]
        self._parts.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (data := file.read(min(size, CHECKED_AT_ONCE))):
        yield data
        size -= len(data)


def _parsed(line: str) -> Any:
    """The JSON of a complete line; None for another one."""
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_part(line: Any) -> bool:
    fields = {"part": str, "end": int, "entries": dict}
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in fields.items())
