"""Serving measurements of both models in a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from farthing.compress.evaluate import Comparison
from farthing.compress.recipe import RECIPES
from farthing.compress.report import CompressionReport, serving_figures, speeds
from farthing.compress.stream import Compression, run
from farthing.model.load import load
from farthing.ops.select import select


def test_what_other_programs_read_is_reported_where_it_differs(tmp_path: Path) -> None:
    def comparison(kl: float) -> Comparison:
        return Comparison(9.0, 9.1, 0.01, (0.0, 0.02), 0.95, kl, 0.9, None, None, 1000, 10)

    sizes = {when: {"memory": 1, "token": 1} for when in ("before", "after")}
    ours = CompressionReport(
        recipe={"name": "int4"}, source="m", export="farthing", transformers_limits=[], size_before=2,
        size_after=1, larger=None, sizes=sizes, seconds=1.0, peak_memory=1, modules=[], coverage=[],
        healed=[], plan=None, quality=comparison(0.25), elsewhere=None, verdict=None, serving=[],
    )  # fmt: skip
    for report, shown in ((ours, False), (replace(ours, elsewhere=comparison(0.75)), True)):
        document = json.loads(report.write(tmp_path).read_text())
        assert document["quality"]["kl"] == 0.25
        assert (document["elsewhere"] and document["elsewhere"]["kl"]) == (0.75 if shown else None)
        page = (tmp_path / "report.html").read_text()
        assert "0.250000 nats" in page and ("0.750000: other programs" in page) == shown


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
