"""Safetensors files, one or sharded by an index, mapped and never read as a whole."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from farthing.checkpoint.error import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TAIL = 4096
_SMALL = 64 << 10  # bytes up to which a tensor is copied: a view would keep its file mapped
_RESIDENT = 64 << 20  # bytes handed out before the files are unmapped and mapped anew
DTYPE_BYTES = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
DTYPE_BYTES |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 2)
DTYPE_BYTES |= dict.fromkeys(("I32", "U32", "F32"), 4) | dict.fromkeys(("I64", "U64", "F64"), 8)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file is missing, not JSON, or not an object."""
    if not file.is_file():
        raise CheckpointError(f"{file}: the file is missing; expected a Hugging Face model directory")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


class Shards:
    """Tensor name -> tensor over the files of one directory. A file is mapped when first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, Any] = {}
        self._names: dict[str, set[str]] = {}
        self._handed_out = 0
        self.file_of: dict[str, str]
        if (path / INDEX).is_file():
            weight_map = read_json(path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{path / INDEX}: expected a non-empty object 'weight_map'")
            self.file_of = {str(k): str(v) for k, v in weight_map.items()}
        elif (path / SINGLE).is_file():
            self._handle(SINGLE)
            self.file_of = dict.fromkeys(self._names[SINGLE], SINGLE)
        else:
            raise CheckpointError(
                f"{path}: holds neither {SINGLE} nor {INDEX}; expected a Hugging Face directory"
            )

    def read(self, name: str) -> Tensor:
        """The tensor as stored, a view of the mapped file (a copy where it is small).

        Pages once read count as resident memory while their mapping lives. Mapping anew now and then lets
        go of those whose tensors the caller has packed already; views still held keep theirs.
        """
        file = self.file_of[name]
        if self._handed_out > _RESIDENT:
            self.release()
        handle = self._handle(file)
        if name not in self._names[file]:
            raise CheckpointError(f"{self.path / file}: {name} is missing, though {INDEX} places it here")
        tensor: Tensor = handle.get_tensor(name)
        self._handed_out += tensor.nbytes
        return tensor.clone() if tensor.nbytes <= _SMALL else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, from the header alone."""
        return tuple(self._handle(self.file_of[name]).get_slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        """Bytes on disk, from the header alone."""
        part = self._handle(self.file_of[name]).get_slice(name)
        return int(prod(part.get_shape())) * DTYPE_BYTES[part.get_dtype()]

    def tail(self, file: str) -> bytes:
        """A file's size (8 bytes) and its last 4096 bytes; the size alone where the file is missing."""
        path = self.path / file
        if not path.is_file():
            return bytes(8)
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(max(0, size - _TAIL))
            return size.to_bytes(8, "little") + stream.read()

    def release(self) -> None:
        """Unmap every file (tensors already handed out stay valid), so that resident memory goes down."""
        self._open.clear()
        self._handed_out = 0

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.path / file
            if not path.is_file():
                raise CheckpointError(f"{path}: the file is missing, though {INDEX} names it")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path}: {_diagnose(path) or error}") from error
            self._names[file] = set(self._open[file].keys())
        return self._open[file]


def _diagnose(path: Path) -> str | None:
    """What is wrong with a file safetensors refused: its size against what its header promises."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            return f"truncated or not safetensors; expected a header of {length} bytes, found {size} in all"
        try:
            header = json.loads(stream.read(length))
            ends = {n: t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return "the header is not valid JSON; expected a safetensors file"
    expected = 8 + length + max(ends.values(), default=0)
    if size == expected:
        return None
    first = min((n for n, end in ends.items() if 8 + length + end > size), key=ends.__getitem__, default=None)
    where = f"; {first} is the first tensor cut" if first else ""
    return f"truncated shard: expected {expected} bytes, found {size}{where}"
