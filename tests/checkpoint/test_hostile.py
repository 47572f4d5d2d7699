"""Hostile files: an index with outside paths, headers with impossible numbers, deep JSON."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import DTYPE_BITS, INDEX, SINGLE, CheckpointError

SECRET = "hunter2-do-not-print"


def model(
    path: Path, weight_map: dict[str, Any] | None = None, header: bytes | None = None, size: int = 64
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    if weight_map is not None:
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if header is not None:
        (path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return path


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "../../secret", "/etc/passwd", "a/b.safetensors", "..", ".", "", "config.json",
     "a\\b.safetensors", "C:x.safetensors", "x\0.safetensors", 7, None, ["model.safetensors"]],
)  # fmt: skip
def test_index_may_only_name_files_of_its_directory(tmp_path: Path, name: Any) -> None:
    (tmp_path / "secret.safetensors").write_text(SECRET)
    (tmp_path / "secret").write_text(SECRET)
    path = model(tmp_path / "model", {"a.weight": name})
    with pytest.raises(CheckpointError, match=r"a\.weight.*same directory") as caught:
        Checkpoint.open(path)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_safetensors_is_not_quoted(tmp_path: Path) -> None:
    path = model(tmp_path / "model", {"a.weight": "b.safetensors"})
    (path / "b.safetensors").write_text(SECRET * 4)
    checkpoint = Checkpoint.open(path)
    with pytest.raises(CheckpointError, match="not a safetensors file") as caught:
        checkpoint.weight("a")
    leaked = str(int.from_bytes(SECRET[:8].encode(), "little"))
    assert SECRET[:4] not in str(caught.value) and leaked not in str(caught.value)


@pytest.mark.parametrize("where", ["header", "index", "config"])
def test_deep_json_is_a_one_line_error(tmp_path: Path, where: str) -> None:
    deep = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    path = model(tmp_path / "model", header=deep if where == "header" else b"{}")
    if where != "header":
        (path / (INDEX if where == "index" else "config.json")).write_bytes(deep)
    with pytest.raises(CheckpointError, match="nested too deeply") as caught:
        Checkpoint.open(path)
    assert len(str(caught.value)) < 500


def entry(begin: Any, end: Any, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(2**62, 2**62 + 16)}, "truncated shard"),
        ({"a": entry(2**80, 2**80 + 16)}, "data_offsets is out of range"),
        ({"a": entry(-16, 0)}, "data_offsets is out of range"),
        ({"a": entry(16, 0)}, "data_offsets is out of range"),
        ({"a": entry("0", 16)}, "not a pair of whole numbers"),
        ({"a": entry(0, 16, (2**62, 2**62))}, r"need more than 2\^60"),
        ({"a": entry(0, 16, (5,))}, "spans 16 bytes; its shape and dtype need 20"),
        ({"a": entry(0, 16, (-4, -1))}, "shape"),
        ({"a": entry(0, 16, (1,) * 65)}, "shape"),
        ({"a": entry(0, 16, dtype="F37")}, "unknown dtype 'F37'"),
        ({"a": entry(0, 16), "b": entry(8, 24)}, "'a' and 'b' overlap"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, "'a' and 'b' overlap"),
        ({"a": entry(0, 16)}, "48 bytes after the last tensor"),
        ({"a": entry(0, 32), "b": entry(48, 64)}, "spans 32 bytes"),
        ({"a": 3}, "expected an object with dtype"),
    ],
)
def test_impossible_headers(tmp_path: Path, header: dict[str, Any], words: str) -> None:
    path = model(tmp_path / "model", header=json.dumps(header).encode())
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(path)
    assert SINGLE in str(caught.value) and len(str(caught.value)) < 500


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
numbers = st.integers(-8, 80) | values
entries = st.builds(
    entry, numbers, numbers, st.lists(st.integers(-1, 8), max_size=3) | values,
    st.sampled_from(["F32", "F4", "BF16", "F8_E4M3", "U8", "C64"]) | values,
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=4), entries | values, max_size=4), cut=st.integers(0, 200))
def test_any_header_opens_or_reports_a_reason(tmp_path: Path, header: dict[str, Any], cut: int) -> None:
    path = model(tmp_path / "model", header=json.dumps(header).encode())
    raw = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(raw[: len(raw) - min(cut, len(raw))])
    try:
        checkpoint = Checkpoint.open(path)
        for name in checkpoint.names():
            checkpoint.nbytes(name)
            checkpoint.tensor(name)
    except CheckpointError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=values | st.fixed_dictionaries({"weight_map": values}))
def test_any_index_opens_or_reports_a_reason(tmp_path: Path, index: Any) -> None:
    path = model(tmp_path / "model")
    save_file({"a": torch.ones(1)}, path / "a.safetensors")
    (path / INDEX).write_text(json.dumps(index))
    try:
        checkpoint = Checkpoint.open(path)
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_the_bits_of_its_name_and_reads_unless_the_library_lacks_it(
    tmp_path: Path, dtype: str
) -> None:
    found = re.search(r"\d+", dtype)
    bits = int(found[0]) if found else 8  # of BOOL
    size = 8 * bits
    path = model(tmp_path, header=json.dumps({"a": entry(0, size, (64,), dtype)}).encode(), size=size)
    try:
        checkpoint = Checkpoint.open(path)
        assert checkpoint.nbytes("a") == size
        checkpoint.tensor("a")
    except CheckpointError as error:
        assert f"Dtype not understood: {dtype}" in str(error) and "\n" not in str(error)
