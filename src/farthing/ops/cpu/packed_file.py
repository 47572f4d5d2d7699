"""Packed weights in one file that is mapped, so that a replica is ready as soon as its pages are touched.

Layout: 64 bytes (magic, offset and length of the index), blobs at multiples of 4096, the index as JSON:
`{"version", "quantization", "source", "entries": {name: {"offset", "bytes"[, "dtype", "shape"]}}}`. An entry
with a dtype is a plain array; one without is a packed matrix as native/pack.cpp writes it. `source` is the
fingerprint of the checkpoint that was packed.

The mapping asks for large pages, which file systems with large folios (ext4 since Linux 6.16, xfs, btrfs)
give to what is read from the disk through it: a process then maps a gigabyte in milliseconds, and a step
reads it faster, since neither translation nor prefetching stops at every 4 KB. What was cached by writing
stays in small pages, so the writer drops its own.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farthing.ops.weights import InputRounding

MAGIC = b"FARTHPK1"
VERSION = 1
PAGE = 4096
HEADER = struct.Struct("<8sQQ40x")


class PackedFile:
    """A packed file, mapped read-only. `quantization` is what the weights were rounded with, or None."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"packed file {str(path)!r} does not exist; write it with --pack")
        size = path.stat().st_size
        if size < HEADER.size:
            raise ValueError(f"packed file {str(path)!r} is cut off: {size} bytes")
        self._map = _mapped(path)
        magic, offset, length = HEADER.unpack(self._map[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError(
                f"{str(path)!r} is not a packed file (its first bytes are {magic!r}, not {MAGIC!r})"
            )
        if offset + length != size:
            raise ValueError(
                f"packed file {str(path)!r} is cut off: {size} bytes, expected {offset + length}"
            )
        index = json.loads(self._map[offset:].tobytes())
        if index["version"] != VERSION:
            raise ValueError(f"packed file version {index['version']} is not readable; expected {VERSION}")
        self.quantization: str | None = index["quantization"]
        self.source: str = index.get("source", "")
        self._entries: dict[str, dict[str, Any]] = index["entries"]
        self._address = self._map.ctypes.data

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def matrix(self, name: str) -> tuple[int, int]:
        """(address, bytes) of a packed matrix."""
        entry = self._entries[name]
        return self._address + entry["offset"], entry["bytes"]

    def tensor(self, name: str) -> Tensor:
        """A plain array, copied out."""
        entry = self._entries[name]
        raw = self._map[entry["offset"] : entry["offset"] + entry["bytes"]].copy()
        return torch.from_numpy(raw).view(getattr(torch, entry["dtype"])).view(entry["shape"])

    def inputs(self, name: str) -> InputRounding | None:
        """How the inputs of a packed matrix are rounded, where its checkpoint said so."""
        stored = self._entries[name].get("inputs")
        return None if stored is None else InputRounding(*stored)


def _mapped(path: Path) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with suppress(AttributeError, OSError):  # systems without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def _uncache(file: BinaryIO) -> None:
    """Bring what was written to the disk and forget its pages."""
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
) -> None:
    """Write (name, packed matrix or tensor) pairs; the file appears only when it is whole."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # replicas may write the same one at once
    try:
        with partial.open("wb") as file:
            _write(
                file,
                blobs,
                {"version": VERSION, "quantization": quantization, "source": source},
                inputs or {},
            )
            _uncache(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write(
    file: BinaryIO,
    blobs: Iterable[tuple[str, Any]],
    head: dict[str, Any],
    inputs: Mapping[str, InputRounding],
) -> None:
    entries: dict[str, dict[str, Any]] = {}
    file.write(bytes(PAGE))
    for name, blob in blobs:
        offset = file.tell()
        if isinstance(blob, Tensor):
            data = blob.contiguous().reshape(-1).view(torch.uint8).numpy()
            entries[name] = {"dtype": str(blob.dtype).removeprefix("torch."), "shape": list(blob.shape)}
        else:
            data = np.empty(blob.serialized_bytes, dtype=np.uint8)
            blob.serialize(data.ctypes.data)
            coarse = inputs.get(name)
            entries[name] = {"inputs": [coarse.bits, coarse.clip, coarse.scale]} if coarse else {}
        entries[name] |= {"offset": offset, "bytes": data.nbytes}
        file.write(data.data)
        file.write(bytes(-file.tell() % PAGE))
    offset = file.tell()
    index = json.dumps(head | {"entries": entries}).encode()
    file.write(index)
    file.seek(0)
    file.write(HEADER.pack(MAGIC, offset, len(index)))
