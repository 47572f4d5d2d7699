"""bench/page.py: replaces its part of the page, keeps the rest, prints misses in bold, keeps rows by kind."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def module(name: str) -> ModuleType:
    """Import a script of bench/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


MACHINE = {"threads": 2, "read_gb_s": 33.0, "int8_gop_s": 900.0, "amx_int8_gop_s": 0.0}


def row(ours: float, batch: int, peers: dict[str, float]) -> dict[str, Any]:
    return {
        "phase": "decode", "batch": batch, "context": 128, "weights": "int4", "rounds": 3,
        "ours_tok_s": ours, "ours_spread": [ours - 1, ours + 1], "limit_tok_s": 200.0,
        "step_bytes": 3e8, "share_of_limit": ours / 200, "peers": peers,
        "peers_spread": {name: [rate - 1, rate + 1] for name, rate in peers.items()},
    }  # fmt: skip


def stored(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": [r | {"model": "L576", "machine": MACHINE, "date": "2026-01-01"} for r in rows]}


def test_only_the_marked_part_changes(tmp_path: Path) -> None:
    page, results = tmp_path / "performance.md", tmp_path / "results.json"
    p = module("page")
    page.write_text("# By hand\n\n<!-- measured: decode -->\nstale\n<!-- end -->\n\nAlso by hand\n")
    results.write_text(
        json.dumps(stored([row(180, 1, {"a": 90.0, "b": 100.0}), row(110, 8, {"a": 100.0}), row(50, 4, {})]))
    )
    for _ in range(2):
        p.write(results, page)
        text = page.read_text()
        assert text.startswith("# By hand\n") and text.endswith("Also by hand\n") and "stale" not in text
        assert "| 180.0 (179.0–181.0) | 100.0 (99.0–101.0; b) | 1.80x | 0.300 | 90% | 1.2x, 85% |" in text
        assert "| 50.0 (49.0–51.0) | – | – | 0.300 | 25% | – |" in text
        assert (
            "| 110.0 (109.0–111.0) | 100.0 (99.0–101.0; a) | **1.10x** | 0.300 | **55%** | 1.35x, 75% |"
            in text
        )
    assert 0 < (tmp_path / "figures/performance.png").stat().st_size < 100_000


def test_page_without_markers_is_unchanged(tmp_path: Path) -> None:
    page, results = tmp_path / "performance.md", tmp_path / "results.json"
    page.write_text("all by hand\n")
    results.write_text(json.dumps(stored([row(1, 1, {})])))
    with pytest.raises(SystemExit, match="measured: decode"):
        module("page").write(results, page)
    assert page.read_text() == "all by hand\n"


def test_rows_are_kept_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("farthing._native")
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setitem(sys.modules, "decode", decode := module("decode"))
    file = tmp_path / "deep/results.json"
    for ours, batch in ((1.0, 1), (2.0, 8), (3.0, 1)):
        decode.keep({"model": "L576", "machine": MACHINE, "rows": [row(ours, batch, {})]}, file)
    decode.keep_section(file, "start", {"rows": []})
    kept = json.loads(file.read_text())
    assert [(r["batch"], r["ours_tok_s"]) for r in kept["rows"]] == [(8, 2.0), (1, 3.0)]
    assert kept["start"]["rows"] == []


def test_share_above_the_limit_is_rejected(tmp_path: Path) -> None:
    page, results = tmp_path / "performance.md", tmp_path / "results.json"
    page.write_text("<!-- measured: decode -->\nold\n<!-- end -->\n")
    results.write_text(json.dumps(stored([row(208, 1, {})])))
    with pytest.raises(SystemExit, match=r"batch 1: share_of_limit is 1\.04"):
        module("page").write(results, page)
    assert "old" in page.read_text()
