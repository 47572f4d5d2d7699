"""Plain tensors of safetensors files as numpy arrays, without torch."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.error import CheckpointError
from farthing.checkpoint.header import diagnose
from farthing.lazy import np
from farthing.ops.arrays import numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "I64": "<i8"}
_SMALL = 64 << 10  # tensors up to this size are copied: a view would keep the file mapped


class ArrayFile:
    """One mapped file. Raises CheckpointError if its header is not valid."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if fault := diagnose(path):
            raise CheckpointError(f"{path}: {fault}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + length

    def names(self) -> set[str]:
        """The tensors in the file."""
        return self._header.keys() - {"__metadata__"}

    def entry(self, name: str) -> dict[str, Any]:
        """A tensor's dtype, shape and place, as the header stores them."""
        found: dict[str, Any] = self._header[name]
        return found

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as stored: a view of the mapped file, or a copy if it is small."""
        entry = self._header[name]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{self._path}: {name}: found {entry['dtype']}; expected one of {', '.join(DTYPES)}"
            )
        dtype = numpy_dtype(DTYPES[entry["dtype"]])
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        # A misaligned tensor is copied, because kernels read whole elements.
        copied = begin % dtype.itemsize or end - begin <= _SMALL
        data = self._map[begin:end] if copied else memoryview(self._map)[begin:end]
        found: NDArray[Any] = np.frombuffer(data, dtype)
        return found.reshape(entry["shape"])
