"""Atomic file writes: a temporary file next to the target, fsync, rename.

A failed write raises OSError with the target's name and leaves the target unchanged.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:  # the fleet writes files without loading torch
    from torch import Tensor

_OS_ERROR = re.compile(r"os error (\d+)")


def replace(target: Path, write: Callable[[Path], None], durable: bool = True) -> None:
    """Let `write` fill a temporary file, then rename it to `target`. Raises OSError.

    durable=False skips the fsync, for state that is rewritten every few seconds.
    """
    partial = partial_of(target)
    try:
        write(partial)
        partial.chmod(_file_mode())  # safetensors creates files readable only by their owner
        if durable:
            _sync(partial)
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(target)) from error
    finally:
        partial.unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    """This process's temporary file for `target`; other processes use other names."""
    return target.with_name(f"{target.name}.{os.getpid()}.tmp")


def replace_text(target: Path, text: str, durable: bool = True) -> None:
    """Write UTF-8 text."""
    replace(target, lambda file: _write(file, text), durable)


def replace_json(target: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON with a final newline."""
    replace_text(target, to_json(value, indent) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Valid JSON of plain values; NaN and infinity become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def replace_tensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors must be contiguous and share no memory."""
    from safetensors.torch import save_file

    replace(target, lambda file: save_file(dict(tensors), str(file), metadata={"format": "pt"}))


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _file_mode() -> int:
    """Read and write permissions for everyone, as far as the umask allows."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
