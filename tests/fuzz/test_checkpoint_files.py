"""Damaged weight files and indexes: every tensor is read, or a CheckpointError names the file.

Seeds are a single file and two shards with an index, dense and INT8; each example is one of them with bytes
or values changed. `-m slow` runs thousands.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import INDEX, SINGLE, CheckpointError
from tests.fuzz.test_http_bodies import ODD, paths_of

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    },
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model directories."""
    root = tmp_path_factory.mktemp("seeds")
    dense = {"a.weight": torch.randn(4, 8), "b.weight": torch.randn(6, 4).bfloat16(), "norm": torch.ones(8)}
    whole = {
        "c.weight": torch.randint(-9, 9, (4, 8), dtype=torch.int8),
        "c.weight_scale": torch.rand(4, 1) + 0.1,
    }
    for name in ("single", "sharded"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({"quantization_config": SCHEME}))
    save_file(dense | whole, root / "single" / SINGLE)
    places: dict[str, str] = {}
    for file, tensors in zip(SHARDS, (dense, whole), strict=True):
        save_file(tensors, root / "sharded" / file)
        places |= dict.fromkeys(tensors, file)
    (root / "sharded" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return root


def read(path: Path) -> None:
    """Read everything. Raises only CheckpointError, with a file name."""
    try:
        checkpoint = Checkpoint.open(path)
        for name in checkpoint.names():
            checkpoint.shape(name)
            checkpoint.nbytes(name)
            checkpoint.tensor(name)
        for module in ("a", "b", "c"):
            if checkpoint.has(f"{module}.weight"):
                checkpoint.stored_as(module)
                checkpoint.weight(module)
        checkpoint.fingerprint()
        checkpoint.stored_bytes()
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 2000, error


def changed_bytes(data: bytes, draw: st.DataObject) -> bytes:
    """Replace, insert or delete bytes, mostly in the header."""
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, min(len(data), 700))) if draw.draw(st.booleans()) else len(data) - 1
        new = draw.draw(st.binary(max_size=8))
        data = data[:at] + new + data[at + draw.draw(st.sampled_from([0, len(new), 5])) :]
    return data


def changed_values(document: Any, draw: st.DataObject) -> Any:
    """Replace values of a JSON document."""
    for _ in range(draw.draw(st.integers(1, 3))):
        where = draw.draw(st.sampled_from([path for path in paths_of(document) if path] or [("weight_map",)]))
        holder = document
        for step in where[:-1]:
            holder = holder[step]
        holder[where[-1]] = draw.draw(ODD)
    return document


def changed_header(data: bytes, draw: st.DataObject) -> bytes:
    """A safetensors file with changed header values."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(changed_values(json.loads(data[8 : 8 + size]), draw)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def fuzz(seeds: Path, work: Path, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(draw: st.DataObject) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(seeds / draw.draw(st.sampled_from(["single", "sharded"])), work)
        file = work / draw.draw(st.sampled_from(sorted(path.name for path in work.iterdir())))
        data = file.read_bytes()
        if draw.draw(st.booleans()):
            data = changed_bytes(data, draw)
        elif file.suffix == ".safetensors":
            data = changed_header(data, draw)
        else:
            data = json.dumps(changed_values(json.loads(data), draw)).encode()
        file.write_bytes(data)
        read(work)

    run()


def test_a_few_damaged_files(seeds: Path, tmp_path: Path) -> None:
    fuzz(seeds, tmp_path / "model", 250)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_damaged_files(seeds: Path, tmp_path: Path) -> None:
    fuzz(seeds, tmp_path / "model", 5000)
