"""The identity of a model's blocks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.config import EngineConfig
from farthing.engine.disk_cache.open import identity, sample
from farthing.model import ModelConfig, random_model
from farthing.ops import LatentCache, select
from tests.engine.conftest import RAW


def test_file_is_told_apart_by_its_bytes_and_its_time(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    rows = torch.randint(0, 255, (1024, 1024), dtype=torch.uint8)
    file.write_bytes(rows.numpy().tobytes())
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    first = sample(file)
    assert sample(file) == first
    order = torch.cat((torch.randperm(1000), torch.arange(1000, 1024)))  # same size and same end
    file.write_bytes(rows[order].numpy().tobytes())
    os.utime(file, ns=times)
    shuffled = sample(file)
    assert shuffled != first
    os.utime(file, ns=(times[0], times[1] + 1))
    assert sample(file) != shuffled
    file.write_bytes(b"short")
    assert sample(file) != first


@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": True},
        {"dtype": "float32"},
        {"quantization": "int8"},
        {"experts": "all"},
        {"experts_on": "cpu"},
        {"experts_on": "cpu", "hot_experts": 1},
        {"speculate": "mtp"},
        {"packed": True},
    ],
)
def test_options_that_change_results_change_the_identity(tmp_path: Path, options: dict[str, Any]) -> None:
    packed, shard = tmp_path / "packed", tmp_path / "shard"
    packed.write_bytes(b"p")
    shard.write_bytes(b"s")
    model = random_model(ModelConfig.from_json(RAW), select("reference"), seed=1)
    cache = LatentCache(torch.zeros(2, 4, 4, 6), None)
    if "packed" in options:
        options = {"packed": str(packed)}

    def of(**given: Any) -> bytes:
        return identity(EngineConfig(**given), model, cache)

    plain, changed = of(), of(**options)
    assert changed != plain
    if "packed" in options:
        packed.write_bytes(b"q")
        assert of(**options) != changed
    model.ops.weight_files = (shard,)
    assert of() != plain
