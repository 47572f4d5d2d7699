"""The automatic plan on tiny models: meets its budget, uses zero blocks where they are free."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.writer import CheckpointWriter
from farthing.compress import plan as plans
from farthing.compress import sensitivity
from farthing.compress.api import Options, compress
from farthing.compress.recipe import RECIPES
from farthing.compress.sensitivity import Option
from farthing.compress.size import Measure, Sizes, reads_of, sizes_of
from farthing.compress.stream import STATE
from farthing.model.config import ModelConfig
from farthing.model.inspect import checkpoint_cost

SMALL = 600  # calibration tokens
AUTO = replace(RECIPES["auto"], calibration_tokens=SMALL, sparsities=())


def stored(path: Path) -> int:
    """Bytes of all tensors, without file headers."""
    checkpoint = Checkpoint.open(path)
    return sum(checkpoint.nbytes(n) for n in checkpoint.names())


@pytest.fixture(scope="module")
def measurements(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State of a run that measured every option of AUTO and found its budget unreachable."""
    out = tmp_path_factory.mktemp("measured")
    with pytest.raises(
        ValueError, match=r"budget_bytes: got 1,000 \(weights read .*expected at least 1\d\d,"
    ):
        compress(
            model_dir, out, replace(AUTO, measure="token", budget_bytes=1000), Options(data, data, window=64)
        )
    return out / STATE


def with_measurements(out: Path, measurements: Path) -> Path:
    """A directory for a run that needs not measure."""
    shutil.copytree(measurements, out / STATE)
    return out


@pytest.mark.parametrize("measure", ["memory", "token"])
def test_auto_meets_a_budget_and_improves_with_a_larger_one(
    measure: Measure, model_dir: Path, data: Path, measurements: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(model_dir)
    before = sizes_of(source, reads_of(ModelConfig.from_json(source.config)))
    auto, options = replace(AUTO, measure=measure), Options(calibration=data, data=data, window=64)
    drops, sizes = [], []
    for share in (0.25, 0.35):
        budget = round(share * before.of(measure))
        out = with_measurements(tmp_path / str(share), measurements)
        outcome = compress(model_dir, out, replace(auto, budget_bytes=budget), options)
        plan, after = outcome.report.plan, outcome.report.sizes["after"]
        assert plan is not None and "least predicted loss" in plan["explanation"]
        # The plan matches the files exactly, except for the rounding of an MTP copy.
        assert plan["predicted"]["file"] == pytest.approx(stored(out), abs=10) == after["file"]
        assert plan["predicted"]["token"] == pytest.approx(after["token"], rel=0.01)
        assert after[measure] <= budget
        assert after["token"] == pytest.approx(checkpoint_cost(out).active_bytes, rel=0.02)
        assert outcome.to_json()["bytes_per_token_after"] == after["token"]
        assert "read per decoded token" in (out / "report.html").read_text()
        drops.append(outcome.report.quality.kl)  # type: ignore[union-attr]
        sizes.append(after[measure])
    assert sizes[0] < sizes[1] and drops[0] > drops[1]


def test_unreachable_budget_is_rejected_and_measurements_are_kept(
    model_dir: Path, data: Path, measurements: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, recipe = Options(data, data, window=64, gate=False), replace(AUTO, measure="token")
    with_measurements(tmp_path / "out", measurements)
    monkeypatch.setattr(sensitivity, "compress_layer", None)  # nothing is measured again
    with pytest.raises(ValueError, match=r"above max_drop 0\.00%; expected a budget of [\d,]+ or more"):
        compress(model_dir, tmp_path / "out", replace(recipe, budget_bytes=200_000, max_drop=1e-9), options)
    monkeypatch.undo()
    compress(model_dir, tmp_path / "out", replace(recipe, budget_bytes=200_000), options)
    assert not (tmp_path / "out" / ".farthing").exists()
    with pytest.raises(ValueError, match="already has a model"):  # before measuring
        compress(model_dir, tmp_path / "out", recipe, options)


def test_files_are_planned_without_zero_blocks(model_dir: Path, data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPES["auto"], calibration_tokens=SMALL, measure="file")
    report = compress(model_dir, tmp_path / "out", recipe, Options(data, data, window=64)).report
    assert report.plan is not None and "files store zeros" in report.plan["explanation"]
    assert not any(m["sparsity"] for m in report.modules)
    groups = {m["group_size"] for m in report.modules if m["format"] == "int4"}
    assert groups <= {32, 64} and "KL int4-32" in report.plan["choices"][0]  # 128 divides no matrix here


def test_the_better_of_two_block_shapes() -> None:
    parts = ("model.layers.0.mlp", "model.layers.1.mlp")

    def plan(fine_kl: float, whole_kl: float, **fields: Any) -> plans.PlanResult:
        recipe = replace(RECIPES["auto"], **fields)
        options = [Option(p, "int4-64", Sizes(100, 100, 100), 0.001) for p in parts]
        options += [Option(p, "int4-64", Sizes(100, 52, 52), fine_kl, 0.5, "16x16") for p in parts]
        options += [Option(p, "int4-64", Sizes(100, 50, 50), whole_kl, 0.5, "16x64") for p in parts]
        chosen, why = plans.best_pattern(options, recipe, Sizes(0, 0, 0))
        return plans.PlanResult(chosen, options, why, 2, Sizes(0, 0, 0), "memory")

    for fine, whole, fields, expected in (
        (0.002, 0.002, {"max_drop": 0.01}, "16x64"),  # fewer bytes
        (0.002, 0.004, {"max_drop": 0.01}, "16x16"),  # only one part may lose so much
        (0.002, 0.001, {"budget_bytes": 110, "max_drop": 0.05}, "16x64"),  # less loss
        (0.002, 0.003, {"budget_bytes": 110, "max_drop": 0.05}, "16x16"),
        (0.002, 0.003, {"budget_bytes": 101, "max_drop": 0.05}, "16x64"),  # nothing else fits
    ):
        result = plan(fine, whole, **fields)
        prune = result.recipe(RECIPES["auto"]).prune
        assert prune is not None and prune.pattern == expected
        assert all(o.pattern == expected for o in result.chosen.values() if o.sparsity)
    with pytest.raises(ValueError, match=r"budget_bytes: got 90 .*expected at least 104"):
        plan(0.002, 0.003, budget_bytes=90)
    assert plan(1.0, 1.0, max_drop=0.01).recipe(RECIPES["auto"]).prune is None


def with_empty_blocks(source: Path, out: Path) -> Path:
    """A copy with a checkerboard of near-zero 16x16 blocks in every feed-forward."""
    checkpoint, writer = Checkpoint.open(source), CheckpointWriter(out)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if ".mlp." in name and name.endswith("_proj.weight"):
            rows, columns = (torch.arange(n) // 16 for n in tensor.shape)
            tensor = tensor * torch.where((rows[:, None] + columns) % 2 == 0, 1.0, 1e-5)
        writer.add(name, tensor)
    writer.close(checkpoint.config, copy_from=source)
    return out


def test_auto_uses_zero_blocks_only_where_they_cost_nothing(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    options = Options(calibration=data, data=data, window=64)
    recipe = replace(RECIPES["auto"], max_drop=1e-3, calibration_tokens=SMALL)
    empty = with_empty_blocks(model_dir, tmp_path / "source")
    full, half = (
        compress(m, tmp_path / str(i), recipe, options).report for i, m in enumerate((model_dir, empty))
    )
    for report in (full, half):
        assert report.plan is not None and report.quality is not None
        assert "25%, 50%" in report.plan["explanation"] and "5 feed-forwards" in report.plan["explanation"]
        assert report.quality.relative_increase < 0.01
        assert all("KL int4-64, 50% of 16x16 blocks zero" in row for row in report.plan["choices"])
    assert "chosen in none: the cheapest costs" in full.plan["explanation"]  # type: ignore[index]
    assert not any(m["sparsity"] for m in full.modules)
    assert "those of 16x16 chosen in 5" in half.plan["explanation"]  # type: ignore[index]
    assert half.plan["predicted"]["memory"] < full.plan["predicted"]["memory"]  # type: ignore[index]
    cut = [m for m in half.modules if ".mlp." in m["module"] and ".layers.3." not in m["module"]]
    assert cut and sum(m["sparsity"] for m in cut) / len(cut) > 0.35
    assert not any(m["sparsity"] for m in half.modules if m not in cut)  # attention and the MTP layer
    formats = {m["module"]: m["format"] for m in half.modules}
    assert formats["model.layers.3.eh_proj"] == "int8"  # not present in other layers
    for module in ("self_attn.o_proj", "mlp.experts.0.up_proj"):  # drafts follow the last layer
        assert formats[f"model.layers.3.{module}"] == formats[f"model.layers.2.{module}"]
    for name, report in (("0", full), ("1", half)):
        sizes, left_out = report.sizes["after"], sum(m["zero_block_bytes"] for m in report.modules)
        assert sizes["file"] == stored(tmp_path / name) == sizes["memory"] + left_out
    assert half.sizes["after"]["token"] < 0.95 * checkpoint_cost(tmp_path / "1").active_bytes
    checkpoint = Checkpoint.open(tmp_path / "1")
    up = checkpoint.weight("model.layers.0.mlp.up_proj").dequantize()
    assert not up[:16, 16:32].any() and bool(up[:16, :16].any())
