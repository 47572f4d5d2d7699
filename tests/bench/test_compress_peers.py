"""The table of quantizers: what a row counts and measures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.parity.families import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("compress_peers", ROOT / "bench" / "compress_peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compress_peers"] = module
    spec.loader.exec_module(module)
    return module


def test_rows_are_measured_against_the_untouched_model(bench: Any, tmp_path: Path) -> None:
    build("llama", 0, tmp_path / "source")
    paths = bench.Paths(tmp_path, None)
    rows = [{"kind": kind, "ids": list(range(2, 40))} for kind in bench.KINDS]
    paths.held_out.write_text("\n".join(map(json.dumps, rows)))
    found = {name: bench.measure(paths, name, bench.ROWS[name]) for name in ("untouched", "load-time int4")}
    kl = {name: bench.mean(row["windows"]) for name, row in found.items()}
    assert abs(kl["untouched"]) < 1e-6 < kl["load-time int4"]
    assert found["load-time int4"]["bytes"] < found["untouched"]["bytes"]
    assert bench.measure(paths, "untouched", bench.ROWS["int4"]) == found["untouched"]  # kept
