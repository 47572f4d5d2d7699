"""Damaged packed files: refused with a ValueError, or matrices of the same layout; never a crash.

The seed holds a dense, an INT8 and a sparse INT4 matrix; each example has bytes changed, or values
of its index with a checksum that fits. `-m slow` runs thousands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("farthing._native")

from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.packed_file import HEADER, MAGIC
from tests.fuzz.test_checkpoint_files import changed_values
from tests.ops.parts import weight
from tests.ops.test_cpu import zero_blocks

MATRICES = {"dense": 64, "int8": 64, "sparse": 256}  # columns by name


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A packed file."""
    path = tmp_path_factory.mktemp("packed") / "seed"
    ops = CpuOps(1)
    ops.pack_linear("dense", lambda: [weight("f32", 32, 64)])
    ops.pack_linear("int8", lambda: [weight("int8", 64, 64)])
    sparse = zero_blocks(weight("int4", 64, 256, 64), 0.7)
    ops.pack_linear("sparse", lambda: [sparse])
    ops.save_packed(str(path))
    return path.read_bytes()


def never() -> Any:
    raise AssertionError("the checkpoint was read although the packed file has it")


def read(path: Path) -> None:
    """Map the file and multiply by every matrix in it, which is of the expected shape or refused."""
    try:
        ops = CpuOps(1, packed=str(path))
    except ValueError as error:
        assert str(path) in str(error)
        return
    try:
        for name, columns in MATRICES.items():
            try:
                handle = ops.pack_linear(name, never)
            except (ValueError, AssertionError):  # refused, or no longer in the index
                continue
            ops.linear(torch.ones(2, handle.k), handle)
            assert handle.k <= 4 * columns
    finally:
        assert ops._file is not None
        ops._file.close()


def fuzz(seed: bytes, path: Path, examples: int) -> None:
    _, offset, length, _ = HEADER.unpack(seed[: HEADER.size])
    entries = json.loads(seed[offset : offset + length])["entries"]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(draw: st.DataObject) -> None:
        data = bytearray(seed)
        if draw.draw(st.booleans()):
            index = json.dumps(changed_values(json.loads(seed[offset : offset + length]), draw)).encode()
            head = HEADER.pack(MAGIC, offset, len(index), xxhash.xxh3_64_intdigest(index))
            data = bytearray(head + seed[HEADER.size : offset] + index)
        for _ in range(draw.draw(st.integers(0, 4))):
            start = draw.draw(st.sampled_from([0, *(entry["offset"] for entry in entries.values())]))
            at = start + draw.draw(st.integers(0, 255))
            if at < len(data):
                data[at] = draw.draw(st.sampled_from([0, 1, 127, 128, 255]))
        if draw.draw(st.integers(0, 9)) == 0:
            del data[draw.draw(st.integers(0, len(data))) :]
        path.write_bytes(data)
        read(path)

    run()


def test_a_few_damaged_files(seed: bytes, tmp_path: Path) -> None:
    fuzz(seed, tmp_path / "model.packed", 250)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_damaged_files(seed: bytes, tmp_path: Path) -> None:
    fuzz(seed, tmp_path / "model.packed", 5000)
