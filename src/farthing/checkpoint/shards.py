"""Safetensors files, single or sharded with an index, memory-mapped and read on demand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from farthing.checkpoint.arrays import ArrayFile
from farthing.checkpoint.error import CheckpointError
from farthing.checkpoint.header import DTYPE_BITS, diagnose

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MISTRAL_INDEX = "consolidated.safetensors.index.json"
_UNREAD = {".gguf": "GGUF", ".bin": "pickled PyTorch", ".pth": "pickled PyTorch", ".onnx": "ONNX"}
_TAIL = 4096
_SMALL = 64 << 10  # tensors up to this size are copied: a view would keep the file mapped
_RESIDENT = 64 << 20  # bytes returned before the files are remapped
_MAX_JSON = 1 << 30  # bytes of a JSON file; the index of DeepSeek-V3 takes 8 MB


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file is missing, not JSON, or not an object."""
    if not file.is_file():
        raise CheckpointError(f"{file}: the file is missing; expected a Hugging Face model directory")
    if file.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes; expected at most {_MAX_JSON:,}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{file}: nested too deeply; expected the JSON of a model directory") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name. Only plain .safetensors names, so an index cannot point elsewhere."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: expected a non-empty object 'weight_map'")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise CheckpointError(
                f"{file}: weight_map places {tensor[:200]!r} in {str(name)[:200]!r}; "
                "expected the name of a .safetensors file in the same directory"
            )
    return weight_map


def unread_format(names: Iterable[str], expected: str) -> str | None:
    """A clause for an error about weights in a format that is not read; None if there are none."""
    suffixes = {PurePosixPath(name).suffix for name in names}
    found = next((kind for suffix, kind in _UNREAD.items() if suffix in suffixes), None)
    return found and f"the weights are {found}, which is not read yet; {expected} with safetensors"


def _is_plain(name: str) -> bool:
    plain = PurePosixPath(name).name == name and not {"/", "\\", "\0", ":"} & set(name)
    return plain and name.endswith(".safetensors")


class Shards:
    """Tensor name -> tensor over the files of a directory. Each file is mapped on first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, Any] = {}
        self._names: dict[str, set[str]] = {}
        self._arrays: dict[str, ArrayFile] = {}
        self._handed_out = 0
        self.reading: Callable[[str], None] = lambda name: None  # called with what `read` returns
        self.file_of: dict[str, str]
        if index := next((i for i in (INDEX, MISTRAL_INDEX) if (path / i).is_file()), None):
            self.file_of = read_index(path / index)
        elif (path / SINGLE).is_file():
            self.file_of = dict.fromkeys(ArrayFile(path / SINGLE).names(), SINGLE)
        else:
            expected = "expected a Hugging Face model directory"
            defect = unread_format(map(str, path.glob("*")), expected)
            raise CheckpointError(f"{path}: {defect or f'has neither {SINGLE} nor {INDEX}; {expected}'}")

    def read(self, name: str) -> Tensor:
        """The tensor as stored: a view of the mapped file, or a copy if it is small.

        Pages that were read stay resident as long as their mapping exists. Remapping a file periodically
        releases the pages of tensors the caller has already packed; existing views keep theirs.
        """
        file = self.file_of[name]
        self.reading(name)
        if self._handed_out > _RESIDENT:
            self.release()
        handle = self._holder(name)
        try:
            tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # or a dtype that torch lacks
            raise CheckpointError(f"{self.path / file}: {name}: {error}") from error
        self._handed_out += tensor.nbytes
        return tensor.clone() if tensor.nbytes <= _SMALL else tensor

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a numpy array; torch is not imported."""
        return self._array_file(name).read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, from the header only."""
        return tuple(self._array_file(name).entry(name)["shape"])

    def nbytes(self, name: str) -> int:
        """Bytes on disk, from the header only."""
        entry = self._array_file(name).entry(name)
        return -(-int(prod(entry["shape"])) * DTYPE_BITS[entry["dtype"]] // 8)

    def dtype(self, name: str) -> str:
        """The dtype as safetensors names it, such as 'F8_E4M3', from the header only."""
        return str(self._array_file(name).entry(name)["dtype"])

    def tail(self, file: str) -> bytes:
        """A file's size (8 bytes) and its last 4096 bytes; only the size if the file is missing."""
        path = self.path / file
        if not path.is_file():
            return bytes(8)
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(max(0, size - _TAIL))
            return size.to_bytes(8, "little") + stream.read()

    def release(self) -> None:
        """Unmap every file to release resident memory; tensors already returned stay valid."""
        self._open.clear()
        self._arrays.clear()
        self._handed_out = 0

    def _array_file(self, name: str) -> ArrayFile:
        """The file with a tensor, read without torch. Raises CheckpointError if the tensor is missing."""
        file = self.file_of[name]
        if file not in self._arrays:
            if not (self.path / file).is_file():
                raise CheckpointError(f"{self.path / file}: the file is missing, but {INDEX} names it")
            self._arrays[file] = ArrayFile(self.path / file)
        if name not in self._arrays[file].names():
            raise CheckpointError(f"{self.path / file}: {name} is missing, though {INDEX} places it here")
        return self._arrays[file]

    def _holder(self, name: str) -> Any:
        """The open file with a tensor. Raises CheckpointError if the tensor is missing."""
        file = self.file_of[name]
        handle = self._handle(file)
        if name not in self._names[file]:
            raise CheckpointError(f"{self.path / file}: {name} is missing, though {INDEX} places it here")
        return handle

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.path / file
            if not path.is_file():
                raise CheckpointError(f"{path}: the file is missing, but {INDEX} names it")
            try:
                handle: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path}: {diagnose(path) or error}") from error
            self._open[file] = handle
            self._names[file] = set(handle.keys())
        return self._open[file]
