"""Serving measurements of both models in a report."""

from __future__ import annotations

from pathlib import Path

from farthing.compress.recipe import RECIPES
from farthing.compress.report import serving_figures, speeds
from farthing.compress.stream import Compression, run
from farthing.model.load import load
from farthing.ops.select import select


def test_rows_contain_both_models(model_dir: Path, tmp_path: Path) -> None:
    run(Compression(model_dir, tmp_path / "out", RECIPES["fp8-block"], None))
    source, compressed = serving_figures(model_dir)(tmp_path / "out")
    assert (source["model"], compressed["model"]) == ("source", "compressed")
    for row, path in ((source, model_dir), (compressed, tmp_path / "out")):
        assert row["bytes"] == sum(f.stat().st_size for f in path.glob("*.safetensors"))
        assert row["backend"] == select("auto").name
        assert row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
        assert row["memory"] is None or row["memory"] > 0


def test_prompt_longer_than_the_context_is_truncated(tmp_path: Path) -> None:
    from tests.compress.conftest import write_model

    short = write_model(tmp_path / "m", max_position_embeddings=64)
    found = speeds({"short": load(short, select("reference"))}, steps=8)
    assert found["short"].prefill > 0 and found["short"].decode > 0
