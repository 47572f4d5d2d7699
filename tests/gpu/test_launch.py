"""Configurations from files: the right one is selected, and invalid files are rejected with a clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farthing.ops.api import Batch
from farthing.ops.torch_util import make_batch
from farthing_gpu import create, launch
from farthing_gpu.launch import (
    MOST_ROWS,
    Config,
    DecodeGraphs,
    bucket,
    config,
    file_name,
    is_decode,
    read_configs,
    width_bucket,
)
from farthing_gpu.matrix import FORMATS
from tests.gpu.parts import DEVICE
from tests.gpu.test_attention import moved

pytest.importorskip("triton")


def written(tmp_path: Path, table: object) -> Path:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(table))
    return path


def test_every_packaged_file_is_valid_and_covers_every_kernel() -> None:
    default = read_configs(launch.FOLDER / "default.json")
    kernels = {f"{kind}_{name}" for kind in ("gemm", "grouped") for name in FORMATS}
    kernels |= {f"{kind}_float32" for kind in ("gemm", "grouped")}
    kernels |= {"decode", "decode_rows", "decode_8bit", "decode_float32", "prefill", "prefill_float32"}
    assert set(default) == kernels | {"two_of_four", "blocks"}
    for path in launch.FOLDER.glob("*.json"):
        assert set(read_configs(path)) <= set(default)
        assert all(c.bn <= 256 for _, c in read_configs(path).get("gemm_fp8", []))  # two tiles, two scales
        assert all(c.bn <= 128 for _, c in read_configs(path).get("grouped_fp8", []))  # one


def test_smallest_configuration_that_fits_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"k": [(16, Config(bm=16)), (64, Config(bm=32))]}
    monkeypatch.setattr(launch, "table", lambda card: table)
    cpu = torch.device("cpu")
    assert [config("k", rows, cpu).bm for rows in (1, 16, 17, 64, 65, 9999)] == [16, 16, 32, 32, 32, 32]


def test_device_file_overrides_the_default_per_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"rows": 16, "bm": 16}
    for name, table in (
        ("default.json", {"a": [entry], "b": [entry], "c": [entry], "d": [entry]}),
        ("shared-163k.json", {"b": [entry | {"bm": 32}], "c": [entry | {"bm": 32}]}),
        ("shared-99k.json", {"c": [entry | {"bm": 64}], "d": [entry | {"bm": 64}]}),
        ("generation-10.json", {"a": [entry | {"bm": 64}]}),
        ("nvidia-h100-80gb-hbm3.json", {"b": [entry | {"bm": 128}]}),
        ("nvidia-l40s.json", {"d": [entry | {"bm": 128}]}),
    ):
        (tmp_path / name).write_text(json.dumps(table))
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    launch.table.cache_clear()

    def tiles(name: str, shared: int, generation: int = 9) -> list[int]:
        table = launch.table(launch.Card(name, 100, shared << 10, generation))
        return [table[kernel][0][1].bm for kernel in "abcd"]

    try:
        assert tiles("NVIDIA H100 80GB HBM3", 227) == [16, 128, 16, 16]
        assert tiles("another card", 227) == [16, 16, 16, 16]
        assert tiles("NVIDIA B200", 227, 10) == [64, 16, 16, 16]
        assert tiles("NVIDIA A100-SXM4-80GB", 163) == [16, 32, 32, 16]
        assert tiles("NVIDIA L4", 99) == [16, 32, 64, 64]
        assert tiles("NVIDIA L40S", 99) == [16, 32, 64, 128]
    finally:
        launch.table.cache_clear()
    assert file_name("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090.json"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"k": [{"rows": 16, "tile": 4}]}, r"k has \['rows', 'tile'\]; expected 'rows' and some of"),
        ({"k": [{"bm": 16}]}, r"k has \['bm'\]; expected 'rows'"),
        ({"k": [{"rows": 16, "bm": 48}]}, "k: bm: got 48; expected a power of two, at least 16"),
        ({"k": [{"rows": 16, "bn": 8}]}, "bn: got 8"),
        ({"k": [{"rows": 16, "num_stages": 9}]}, "num_stages: got 9; expected 1 to 8"),
        ({"k": [{"rows": 64}, {"rows": 16}]}, r"k has rows \[64, 16\]; expected some, ascending"),
        ({"k": []}, r"k has rows \[\]"),
    ],
)
def test_invalid_file_is_rejected(tmp_path: Path, table: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_configs(written(tmp_path, table))
    broken = tmp_path / "card.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"card\.json is not JSON"):
        read_configs(broken)


def test_factory_rejects_unsupported_options() -> None:
    with pytest.raises(
        ValueError, match=r"^dtype: got torch\.float16 with backend 'gpu'; expected float32 or bfloat16$"
    ):
        create(torch.float16, None, None, None)
    with pytest.raises(ValueError, match=r"^quantization: got 'int2'; expected 'int8', 'int4' or None$"):
        create(None, None, "int2", None)
    with pytest.raises(ValueError, match="reads no packed file"):
        create(None, None, None, "x.farthing")


@given(st.integers(1, MOST_ROWS))
def test_bucket_fits_its_rows_closely(rows: int) -> None:
    size = bucket(rows)
    assert size is not None and rows <= size <= MOST_ROWS
    assert size < 2 * rows and size - rows < 32
    assert bucket(size) == size


def test_buckets_are_few() -> None:
    assert len({bucket(n) for n in range(1, MOST_ROWS + 1)}) == 4 + 7 + 14
    assert bucket(MOST_ROWS + 1) is None
    assert [width_bucket(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


def test_step_is_padded_with_its_first_row() -> None:
    graphs, seen = DecodeGraphs(), []

    def layers(hidden: torch.Tensor, batch: Batch, live: torch.Tensor) -> torch.Tensor:
        seen.append((hidden.clone(), batch.slots.clone(), int(live) if DEVICE.type == "cpu" else None))
        return hidden * 2

    def step(rows: int) -> torch.Tensor:
        batch = moved(make_batch([1] * rows, [17] * rows, [[i, i + 9] for i in range(rows)], 16))
        assert is_decode(batch)
        x = torch.randn(rows, 4, device=DEVICE)
        y = graphs.run("layers", layers, x, batch)
        assert torch.equal(y, x * 2)
        return y

    first = step(3)
    kept = first.clone()
    step(4)
    assert torch.equal(first, kept)  # a step's result is not overwritten by the next step
    assert len(graphs) == 1
    hidden, slots, live = seen[0]
    assert hidden.shape == (4, 4) and torch.equal(hidden[3], hidden[0])
    assert torch.equal(slots[3], slots[0])
    assert live in (3, None)
    step(5)
    assert len(graphs) == 2
