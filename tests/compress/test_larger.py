"""Results larger than their source are reported, beforehand if they can be estimated, and afterwards."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from farthing.checkpoint.gguf import INDEX
from farthing.checkpoint.reader import Checkpoint
from farthing.compress.api import Options, compress, grown
from farthing.compress.export import choose_export, expected_bytes
from farthing.compress.recipe import default_recipe, known_recipes
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig

RECIPES = known_recipes()


def nbytes(path: Path) -> int:
    checkpoint = Checkpoint.open(path)
    return sum(map(checkpoint.nbytes, checkpoint.names()))


def expected(source: Path, recipe: str) -> int | None:
    checkpoint, config = Checkpoint.open(source), ModelConfig.from_directory(source)
    export = choose_export("auto", RECIPES[recipe], checkpoint, config)
    return expected_bytes(export, checkpoint, config, RECIPES[recipe])


def test_estimate_is_close_and_growth_is_reported(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dense to INT4, which is smaller; INT4 to INT8, which is larger."""
    small, large = tmp_path / "small", tmp_path / "large"
    estimate = expected(model_dir, "int4-rtn")
    with caplog.at_level(logging.WARNING, "farthing"):
        report = compress(model_dir, small, RECIPES["int4-rtn"], Options(gate=False)).report
    assert estimate == pytest.approx(nbytes(small), rel=0.03)
    assert report.larger is None and "larger than its source" not in caplog.text
    estimate = expected(small, "int8")
    with caplog.at_level(logging.WARNING, "farthing"):
        outcome = compress(small, large, RECIPES["int8"], Options(gate=False))
    assert estimate == pytest.approx(nbytes(large), rel=0.03)
    said = [record.getMessage() for record in caplog.records if "larger than its source" in record.message]
    assert [text.startswith("expected: ") for text in said] == [True, False]
    assert said[1] == outcome.report.larger == outcome.to_json()["larger"]
    assert json.loads((large / "report.json").read_text())["larger"] == said[1]
    assert f"{outcome.report.size_before:,} -> {outcome.report.size_after:,} bytes" in said[1]


@pytest.mark.parametrize("recipe", ["auto", "experts-reap", "adaptive-experts", "prune-wanda"])
def test_plans_and_pruning_are_not_estimated(model_dir: Path, recipe: str) -> None:
    assert expected(model_dir, recipe) is None


def test_equal_sizes_are_not_growth() -> None:
    assert grown(10, 10) is None


def test_the_default_recipe_shrinks_the_source(tmp_path: Path) -> None:
    """INT8 would make FP8 checkpoints, GGUF and the embedded model larger."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    assert default_recipe(tmp_path) == "int8"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    assert default_recipe(tmp_path) == "int4"
    for kind, recipe in (("F16", "int8"), ("Q4_K", "int4")):
        (tmp_path / INDEX).write_text(
            json.dumps({"a.weight": {"file": "f", "type": kind, "shape": [1, 256]}})
        )
        assert default_recipe(tmp_path) == recipe
    source = resolve_model("mite")
    chosen, before = default_recipe(source), nbytes(source)
    assert (expected(source, "int8") or 0) > before > (expected(source, chosen) or before)
