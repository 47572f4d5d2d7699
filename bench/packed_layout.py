"""Packed files of benchmark models, and whether this build would write the same bytes.

A digest of what the native code packs small matrices to, one per format, is stored next to each file. A build
that changes only kernels has the same digest, so its benchmarks reuse the files.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import xxhash

from farthing.checkpoint.floats import quantize_blocks
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import HELD, PackedFormat, Plan, pack
from farthing.ops.cpu.packed import VERSION
from farthing.ops.weights import BLOCK, INTEGERS, Weight

ROWS, COLUMNS, GROUP = 40, 192, 64  # 40: the last panel is padded


def packed_file(model: Path, weights: str) -> Path:
    """The packed file of a model directory."""
    return model.with_name(f"{model.name}-{weights}.packed")


def is_current(file: Path) -> bool:
    """Whether the file exists and has the layout of this build."""
    note = _note(file)
    return file.exists() and note.exists() and note.read_text() == layout()


def stamp(file: Path) -> None:
    """Record that this build wrote the file."""
    _note(file).write_text(layout())


def _note(file: Path) -> Path:
    return file.with_name(f"{file.name}.layout")


@cache
def layout() -> str:
    """A digest of the version and of the same matrix in every packed format, dense and block-sparse."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    values[: 2 * BLOCK, : 3 * BLOCK] = 0
    native, found = CpuOps(1)._native, xxhash.xxh3_64(str(VERSION).encode())
    rounded = [kind for kind, name in HELD.items() if name not in INTEGERS or name in ("int8", "int4")]
    for kind in (*rounded, PackedFormat.Q8_PLANES):  # the others are packed as files hold them
        stored = kind == PackedFormat.FP8  # which is packed as stored only
        weight = Weight("fp8", *quantize_blocks(values)) if stored else Weight("dense", values)
        for blocks in (False, True):
            matrix = pack(native, [weight], Plan(kind, GROUP), blocks=blocks)
            data = np.zeros(matrix.serialized_bytes, dtype=np.uint8)
            matrix.serialize(data.ctypes.data, 0)
            found.update(data)
    return found.hexdigest()
