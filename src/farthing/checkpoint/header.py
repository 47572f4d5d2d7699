"""Diagnosis of a safetensors file that the library rejected.

The library validates every header before it maps a tensor, but its messages name neither the tensor nor the
wrong value. This module rereads the untrusted header and reports both. It quotes nothing from a file that is
not safetensors, because an index may point to any other file.
"""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000  # bytes; the library's own limit
DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
DTYPE_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
DTYPE_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
DTYPE_BITS |= dict.fromkeys(("I32", "U32", "F32"), 32) | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
NOT_SAFETENSORS = "not a safetensors file"


def diagnose(path: Path) -> str | None:
    """One line about the first fault found; None if the header looks valid."""
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
