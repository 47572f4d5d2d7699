"""Safetensors files, single or sharded: mapped, read on demand or ahead of use, diagnosed when damaged."""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError, safe_open

from farthing.lazy import np
from farthing.ops import numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from farthing.ops import Format, Weight


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file, the tensor, the expected and found values."""


MAX_HEADER = 100_000_000  # bytes; the library's own limit
DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
DTYPE_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
DTYPE_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
DTYPE_BITS |= dict.fromkeys(("I32", "U32", "F32"), 32) | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
NOT_SAFETENSORS = "not a safetensors file"


def diagnose(path: Path) -> str | None:
    """One line about the first fault found; None if the header looks valid.

    The library validates every header before it maps a tensor, but its messages name neither the tensor nor
    the wrong value. The untrusted header is reread here, and both are reported. Nothing is quoted from a file
    that is not safetensors, because an index may point to any other file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            return f"truncated or not safetensors; expected at least 8 bytes, found {size}"
        if length > MAX_HEADER:
            return NOT_SAFETENSORS
        if 8 + length > size:
            return f"truncated or not safetensors; expected a header of {length} bytes, found {size} in all"
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except RecursionError:
        return "the header is nested too deeply; expected an object of tensors"
    except ValueError:
        return f"the header is not valid JSON; {NOT_SAFETENSORS}"
    if not isinstance(header, dict):
        return NOT_SAFETENSORS
    spans: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if fault := _entry_fault(entry):
            return f"tensor {name[:200]!r}: {fault}"
        spans[name] = tuple(entry["data_offsets"])
    return _layout_fault(spans, size - 8 - length)


def _entry_fault(entry: Any) -> str | None:
    """A fault in one tensor's dtype, shape or offsets; None if there is none."""
    if not isinstance(entry, dict):
        return "expected an object with dtype, shape and data_offsets"
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"unknown dtype {str(dtype)[:40]!r}; expected one of {', '.join(DTYPE_BITS)}"
    if not isinstance(shape, list) or len(shape) > 64:
        return "shape is not a list of at most 64 sizes"
    if not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        return "a size in shape is out of range; expected whole numbers of 0 or more"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        return "data_offsets is not a pair of whole numbers"
    begin, end = offsets
    if not 0 <= begin <= end < 2**63:
        return "data_offsets is out of range; expected 0 <= begin <= end"
    if 8 * (end - begin) != prod(shape) * DTYPE_BITS[dtype]:
        return f"data_offsets spans {end - begin} bytes; its shape and dtype need {_need(shape, dtype)}"
    return None


def _need(shape: list[int], dtype: str) -> str:
    bits = prod(shape) * DTYPE_BITS[dtype]
    return f"{-(-bits // 8)}" if bits < 2**63 else "more than 2^60"


def _layout_fault(spans: dict[str, tuple[int, int]], size: int) -> str | None:
    """A fault in the tensors' layout in `size` bytes of data: overlaps, gaps, or a truncated file."""
    ordered = sorted(spans, key=spans.__getitem__)
    for before, after in pairwise(ordered):
        if spans[after][0] < spans[before][1]:
            return f"tensors {before[:200]!r} and {after[:200]!r} overlap"
    end = max((span[1] for span in spans.values()), default=0)
    if size == end:
        return None
    first = next((name for name in ordered if spans[name][1] > size), None)
    if first is None:
        return f"{size - end} bytes after the last tensor; expected none"
    return f"truncated shard: expected {end} bytes, found {size}; {first[:200]} is the first tensor cut"


# Plain tensors of safetensors files as numpy arrays, without torch.

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
DTYPES |= {"I64": "<i8", "I32": "<i4"}
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

    def __contains__(self, name: str) -> bool:
        return name in self._header and name != "__metadata__"

    def names(self) -> set[str]:
        """The tensors in the file."""
        return self._header.keys() - {"__metadata__"}

    def entry(self, name: str) -> dict[str, Any]:
        """A tensor's dtype, shape and place, as the header stores them."""
        entry: dict[str, Any] = self._header[name]
        return entry

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
        flat: NDArray[Any] = np.frombuffer(data, dtype)
        return flat.reshape(entry["shape"])


WINDOW = 512 << 20  # bytes requested ahead, which the page cache must hold


class ReadAhead:
    """A thread that stays at most WINDOW bytes ahead of `passed`; use it with `with`.

    order: (name, file) in the expected order. Does nothing where the system has no `posix_fadvise`.

    The order is a guess. A tensor that is never read is skipped as soon as a later one is.
    """

    def __init__(self, path: Path, order: Sequence[tuple[str, str]]) -> None:
        self._path, self._order = path, order
        self._at = {name: i for i, (name, _) in enumerate(order)}
        self._sizes: list[int] = []  # of the tensors requested so far
        self._ahead, self._next, self._stopped = 0, 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        if hasattr(os, "posix_fadvise"):
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def passed(self, name: str) -> None:
        """A tensor is being read."""
        at = self._at.get(name, -1)
        with self._changed:
            if at < self._next:
                return
            self._ahead -= sum(self._sizes[self._next : at + 1])
            self._next = at + 1
            self._changed.notify()

    def _run(self) -> None:
        spans: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {}
        try:
            for name, file in self._order:
                if file not in spans:
                    spans[file] = _opened(self._path / file)
                opened, of = spans[file]
                begin, end = of.get(name, (0, 0))
                if not self._reserve(end - begin):
                    return
                if end > begin:
                    os.posix_fadvise(opened, begin, end - begin, os.POSIX_FADV_WILLNEED)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # a damaged checkpoint is reported by the reader
        finally:
            for opened, _ in spans.values():
                os.close(opened)

    def _reserve(self, size: int) -> bool:
        """Wait until the next tensor may be requested; False at the end."""
        with self._changed:
            at = len(self._sizes)
            self._sizes.append(size)
            if at >= self._next:
                self._ahead += size
            most = max(WINDOW, size)
            self._changed.wait_for(lambda: self._stopped or self._ahead <= most or at < self._next)
            return not self._stopped


def _opened(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """A file and where its tensors begin and end."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > MAX_HEADER:
            raise ValueError(path)
        header = json.loads(file.read(start - 8))
    offsets = {name: e["data_offsets"] for name, e in header.items() if name != "__metadata__"}
    return os.open(path, os.O_RDONLY), {n: (start + a, start + b) for n, (a, b) in offsets.items()}


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MISTRAL_INDEX = "consolidated.safetensors.index.json"
_UNREAD = {".bin": "pickled PyTorch", ".pth": "pickled PyTorch", ".onnx": "ONNX"}
_TAIL = 4096
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
        raise CheckpointError(
            f"{file}: not valid JSON ({error}); if it was cut short, download or copy it again"
        ) from error
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
    """A clause for an error about weights that are not read so; None if there are none."""
    suffixes = {PurePosixPath(name).suffix for name in names}
    unreadable = next((kind for suffix, kind in _UNREAD.items() if suffix in suffixes), None)
    return unreadable and f"the weights are {unreadable}, which is not read yet; {expected} with safetensors"


def _is_plain(name: str) -> bool:
    plain = PurePosixPath(name).name == name and not {"/", "\\", "\0", ":"} & set(name)
    return plain and name.endswith(".safetensors")


class Shards:
    """Tensor name -> tensor over the files of a directory. Each file is mapped on first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays = False  # whether `weight` is made of numpy arrays
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
        self.reading(name)
        return self._array_file(name).read(name)

    def stored(self, name: str) -> tuple[Format, int] | None:
        """Format and columns of a group of a matrix that is one tensor in a format of its own, from the
        header only; None for others."""
        return None

    def weight(self, name: str) -> Weight | None:
        """Such a matrix; None for other tensors."""
        return None

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
        if name not in self._arrays[file]:
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
