"""Damaged packed files: a one-line error, or a matrix of the packed layout.

`-m slow` combines all kinds of damage in thousands of files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("farthing._native")

from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.packed import HEADER, MAGIC, DamagedFile
from farthing.ops.specs import AttentionSpec, RouterSpec
from tests.fuzz.test_checkpoint_files import changed_values
from tests.ops.parts import EPS, FORMATS, experts, weight, zero_blocks

SPEC, LAYOUT = RouterSpec(4, 2), AttentionSpec(2, 16, 8, 16, 32, 0.2)
ROPE = torch.ones(2, 8, LAYOUT.rope_dim // 2)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**32, 2**40, 2**63 - 1, 2**64, 4096, 4097]),
    st.integers(-(2**66), 2**66),
)
VALUES = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.floats(), st.text(max_size=5), st.lists(NUMBERS, max_size=4)
)
SECTION_HEAD = struct.Struct("<IIiiiIII Q Q 16x")  # native/pack/pack.cpp
COMMON = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path, ops = tmp_path_factory.mktemp("packed") / "m", CpuOps(1)
    for name in FORMATS:
        matrix = weight(name, 48, 128)
        ops.pack_linear(name, lambda matrix=matrix: [matrix])  # type: ignore[misc]
    sparse = zero_blocks(weight("int4", 64, 256, 64), 0.7)
    ops.pack_linear("sparse", lambda: [sparse])
    ops.pack_moe("moe", SPEC, lambda: experts(SPEC, "int4", 64, 64, 64))
    kv_b = weight("bf16", LAYOUT.num_heads * (LAYOUT.nope_dim + LAYOUT.value_dim), LAYOUT.latent_dim)
    ops.pack_attention("a", LAYOUT, lambda: (kv_b, torch.ones(LAYOUT.latent_dim)), ROPE)
    ops.save_packed(str(path))
    return path.read_bytes()


def index_of(whole: bytes) -> tuple[int, dict[str, Any]]:
    _, offset, length, _ = HEADER.unpack(whole[: HEADER.size])
    return offset, json.loads(whole[offset : offset + length])


def with_index(whole: bytes, index: Any) -> bytes:
    """The file with another index and a correct checksum."""
    offset, text = index_of(whole)[0], json.dumps(index).encode()
    head = HEADER.pack(MAGIC, offset, len(text), xxhash.xxh3_64_intdigest(text))
    return head + whole[HEADER.size : offset] + text


@contextmanager
def one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, DamagedFile) as error:  # the second from the background check
        assert "\n" not in str(error) and len(str(error)) < 1000


def missing() -> Any:
    raise ValueError("the packed file lacks it")


def use(path: Path, data: bytes) -> bool:
    """Map and compute with everything in the file. Returns whether every checksum is correct."""
    path.write_bytes(data)
    sound = False
    with one_line():
        ops = CpuOps(1, packed=str(path))
        assert ops._file is not None
        try:
            for name in (*FORMATS, "sparse"):
                with one_line():
                    handle = ops.pack_linear(name, missing)
                    ops.linear(torch.ones(3, handle.k), handle)
            with one_line():
                ops.moe(torch.ones(3, 64), ops.pack_moe("moe", SPEC, missing), Norm(torch.ones(64), EPS))
            with one_line():
                ops.pack_attention("a", LAYOUT, missing, ROPE)
            with one_line():
                ops.verify_packed()
                sound = True
        finally:
            ops._file.close()
    return sound


@COMMON
@given(data=st.data())
def test_truncated(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    use(tmp_path / "m", whole[: data.draw(st.integers(0, len(whole) - 1))])


@COMMON
@given(data=st.data())
def test_flipped_bits(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    """Flips in the head, section heads, index, or anywhere: checksums detect them outside padding."""
    offset, index = index_of(whole)
    entries = index["entries"].values()
    starts = [0, offset, *(e["offset"] for e in entries)]
    used = [slice(HEADER.size - 32), slice(offset, None)]
    used += [slice(e["offset"], e["offset"] + e["bytes"]) for e in entries]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, 255))
        at = data.draw(st.one_of(st.just(near), st.integers(0, len(whole) - 1))) % len(whole)
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
    sound = use(tmp_path / "m", bytes(changed))
    assert sound == all(changed[part] == whole[part] for part in used)


@COMMON
@given(data=st.data())
def test_heads_of_sections(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    """Put any number in any field of a matrix's head."""
    _, index = index_of(whole)
    name = data.draw(st.sampled_from([n for n, e in index["entries"].items() if "dtype" not in e]))
    at, changed = index["entries"][name]["offset"], bytearray(whole)
    fields = list(SECTION_HEAD.unpack_from(changed, at))
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(1, len(fields) - 2))
        near = data.draw(st.sampled_from([fields[i] + 1, fields[i] - 1, 2 * fields[i], 0, 1, 3, 7]))
        number = data.draw(st.one_of(st.just(near), NUMBERS))
        bits = 64 if i >= 8 else 32
        number %= 2**bits
        fields[i] = number - 2**32 if 2 <= i <= 4 and number >= 2**31 else number
    SECTION_HEAD.pack_into(changed, at, *fields)
    use(tmp_path / "m", bytes(changed))


@COMMON
@given(data=st.data())
def test_swapped_sections(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    _, index = index_of(whole)
    names = st.sampled_from(sorted(index["entries"]))
    a, b = data.draw(names), data.draw(names)
    entries = index["entries"]
    entries[a], entries[b] = entries[b], entries[a]
    use(tmp_path / "m", with_index(whole, index))


@COMMON
@given(data=st.data())
def test_numbers_of_the_index(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    _, index = index_of(whole)
    name = data.draw(st.sampled_from(sorted(index["entries"])))
    field = data.draw(st.sampled_from(["offset", "bytes", "checksum", "dtype", "shape", "inputs"]))
    index["entries"][name][field] = data.draw(VALUES)
    use(tmp_path / "m", with_index(whole, index))


@COMMON
@given(index=st.recursive(VALUES, lambda v: st.dictionaries(st.sampled_from(["version", "entries", "x"]), v)))
def test_indexes_of_another_shape(tmp_path: Path, whole: bytes, index: Any) -> None:
    use(tmp_path / "m", with_index(whole, index))


@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(COMMON, max_examples=5000)
@given(data=st.data())
def test_many_damaged_files(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    _, index = index_of(whole)
    starts = [0, *(entry["offset"] for entry in index["entries"].values())]
    changed = bytearray(with_index(whole, changed_values(index, data)) if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, 255))
        if at < len(changed):
            changed[at] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    if data.draw(st.integers(0, 9)) == 0:
        del changed[data.draw(st.integers(0, len(changed))) :]
    use(tmp_path / "m", bytes(changed))
