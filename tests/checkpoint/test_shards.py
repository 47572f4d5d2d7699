"""Tensors are requested from the disk in order, a bounded number of bytes before they are read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from farthing.checkpoint import shards
from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import ReadAhead
from farthing.model.config import ModelConfig
from farthing.model.pack import reading_order
from tests.tiny import tiny

NAMES = [f"t{i}" for i in range(10)]
SIZE = 1000
pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise")


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int]]:
    """The ranges requested, with a window of 2.5 tensors."""
    half = len(NAMES) // 2
    for file, names in (("a", NAMES[:half]), ("b", NAMES[half:])):
        save_file({n: np.zeros(SIZE, np.uint8) for n in names}, tmp_path / f"{file}.safetensors")
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, begin, size, advice: found.append((begin, size)))
    monkeypatch.setattr(shards, "WINDOW", 2.5 * SIZE)
    return found


def order() -> list[tuple[str, str]]:
    return [(n, "a.safetensors" if i < len(NAMES) // 2 else "b.safetensors") for i, n in enumerate(NAMES)]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def test_stays_within_its_window(requested: list[tuple[int, int]], tmp_path: Path) -> None:
    with ReadAhead(tmp_path, order()) as ahead:
        until(lambda: len(requested) == 2)
        ahead.passed("unknown")
        ahead.passed("t0")
        until(lambda: len(requested) == 3)
        ahead.passed("t5")  # the others before it are never read
        until(lambda: len(requested) >= 8 - 3)
        ahead.passed("t2")  # late: already behind
        for name in NAMES:
            ahead.passed(name)
        until(lambda: requested[-1] == requested[len(requested) - 1])
    assert all(size == SIZE for _, size in requested)
    assert len(requested) <= len(NAMES)


def test_whole_checkpoint_is_requested(requested: list[tuple[int, int]], tmp_path: Path) -> None:
    with ReadAhead(tmp_path, order()) as ahead:
        for i, name in enumerate(NAMES):
            until(lambda i=i: len(requested) > i)  # type: ignore[misc]
            ahead.passed(name)
    half = len(NAMES) // 2
    assert [b - requested[0][0] for b, _ in requested[:half]] == [SIZE * i for i in range(half)]


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]"], ids=["empty", "huge", "list"]
)
def test_damaged_files_are_left_to_the_reader(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with ReadAhead(tmp_path, [("t", "a.safetensors"), ("u", "missing.safetensors")]) as ahead:
        ahead.passed("t")


def test_reading_order_is_that_of_packing(tmp_path: Path) -> None:
    config = ModelConfig.from_json(tiny(num_hidden_layers=2, num_nextn_predict_layers=1))
    layer = [
        "self_attn.o_proj.weight",
        *(f"mlp.experts.{e}.{part}.weight" for e in (0, 2, 10) for part in ("down_proj", "up_proj")),
        "mlp.shared_experts.up_proj.weight",
    ]
    of = {i: [f"model.layers.{i}.{name}" for name in layer] for i in range(3)}
    expected = [*of[1], "lm_head.weight", *of[2]]
    assert reading_order(sorted(of[0] + expected), {"layer 0"}, config) == expected


def test_checkpoint_reports_what_it_reads(requested: list[tuple[int, int]], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({n: np.zeros(SIZE, np.float32) for n in NAMES}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with checkpoint.read_ahead(NAMES):
        for name in NAMES:
            until(lambda name=name: len(requested) > NAMES.index(name))  # type: ignore[misc]
            checkpoint.tensor(name)
    assert len(requested) == len(NAMES)
