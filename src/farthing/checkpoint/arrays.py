"""Plain tensors of safetensors files as numpy arrays, without torch."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farthing.checkpoint.error import CheckpointError
from farthing.checkpoint.header import diagnose
from farthing.ops.arrays import BFLOAT16

DTYPES: dict[str, Any] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
}
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

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as stored: a view of the mapped file, or a copy if it is small."""
        entry = self._header[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{self._path}: {name}: found {entry['dtype']}; expected one of {', '.join(DTYPES)}"
            )
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        # A misaligned tensor is copied, because kernels read whole elements.
        copied = begin % dtype.itemsize or end - begin <= _SMALL
        data = self._map[begin:end] if copied else memoryview(self._map)[begin:end]
        found: NDArray[Any] = np.frombuffer(data, dtype)
        return found.reshape(entry["shape"])
