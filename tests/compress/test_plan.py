"""The automatic plan on tiny models: meets its budget, uses zero blocks where they are free."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from farthing.checkpoint.reader import Checkpoint
from farthing.compress import sensitivity
from farthing.compress.api import Options, compress
from farthing.compress.plan import knapsack
from farthing.compress.recipe import RECIPES
from farthing.compress.size import Measure, head_in_8_bits, reads_of, sizes_of
from farthing.compress.stream import STATE
from farthing.model.config import ModelConfig
from farthing.model.inspect import checkpoint_cost

SMALL = 600  # calibration tokens
AUTO = replace(RECIPES["auto"], calibration_tokens=SMALL)


def stored(path: Path) -> int:
    """Bytes of all tensors, without file headers."""
    checkpoint = Checkpoint.open(path)
    return sum(checkpoint.nbytes(n) for n in checkpoint.names())


@pytest.fixture(scope="module")
def measurements(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State of a run that measured every option of AUTO and found that its budget costs too much."""
    out = tmp_path_factory.mktemp("measured")
    source = Checkpoint.open(model_dir)
    size = sizes_of(source, reads_of(ModelConfig.from_json(source.config))).token
    auto = replace(AUTO, measure="token", budget_bytes=size * 3 // 10, max_drop=1e-9)
    with pytest.raises(ValueError, match=r"above max_drop 0.00%; expected a budget of"):
        compress(model_dir, out, auto, Options(data, data, window=64))
    return out / STATE


@pytest.mark.parametrize("measure", ["memory", "file", "token"])
def test_an_unreachable_budget_is_refused_before_any_work(
    measure: Measure, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    auto = replace(AUTO, measure=measure, budget_bytes=1000)
    with pytest.raises(ValueError, match=r"budget_bytes: got 1,000 \(.*expected at least \d\d\d,\d"):
        compress(model_dir, tmp_path / "out", auto, Options(data, data, window=64))
    assert not (tmp_path / "out" / STATE / "sensitivity.json").exists()


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
    measured = json.loads((measurements / "sensitivity.json").read_text())["measured"]["options"]
    drops, sizes = [], []
    for share in (0.25, 0.35):
        budget = round(share * before.of(measure))
        out = with_measurements(tmp_path / str(share), measurements)
        outcome = compress(model_dir, out, replace(auto, budget_bytes=budget), options)
        plan, after = outcome.report.plan, outcome.report.sizes["after"]
        assert plan is not None and "least predicted loss" in plan["explanation"]
        # The plan matches the files exactly, except for the rounding of an MTP copy.
        assert plan["predicted"]["file"] == pytest.approx(stored(out), abs=10) == after["file"]
        assert plan["predicted"]["memory"] == pytest.approx(after["memory"], abs=10)
        assert plan["predicted"]["token"] == pytest.approx(after["token"], rel=0.01)
        for row in plan["choices"]:  # losses are scaled to those of a whole model, by layer
            shown = {n[3:]: float(row[n]) for n in row if n.startswith("KL ") and row[n]}
            own = {o["format"]: o["kl"] for o in measured if o["part"] == row["part"]}
            unit = sum(shown.values()) / sum(own.values())
            assert shown == pytest.approx({name: unit * kl for name, kl in own.items()}, abs=2e-6)
        assert after[measure] <= budget
        result = Checkpoint.open(out)
        head, rounded = head_in_8_bits(result)
        saved = result.nbytes(f"{head}.weight") - rounded  # the head is rounded while loading
        assert saved > 0 and after["memory"] == after["file"] - saved
        assert after["token"] == pytest.approx(checkpoint_cost(out).active_bytes - saved, rel=0.02)
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


def test_files_are_planned_by_their_own_sizes(model_dir: Path, data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPES["auto"], calibration_tokens=SMALL, measure="file")
    report = compress(model_dir, tmp_path / "out", recipe, Options(data, data, window=64)).report
    assert report.plan is not None and "all weight files" in report.plan["explanation"]
    groups = {m["group_size"] for m in report.modules if m["format"] == "int4"}
    assert groups <= {32, 64} and "KL int4-32" in report.plan["choices"][0]  # 128 divides no matrix here


def test_a_matrix_has_its_own_format(measurements: Path) -> None:
    """Queries and outputs need not have the format of the latents, nor down-projections that of the gates,
    which the up-projections share."""
    options = json.loads((measurements / "sensitivity.json").read_text())["measured"]["options"]
    parts = {o["part"].split(".", 3)[3] for o in options}
    assert {"self_attn.o_proj", "self_attn.kv_a_proj_with_mqa", "mlp.gate_proj", "mlp.down_proj"} <= parts
    assert "mlp.experts" in parts and not any("up_proj" in part or ".experts." in part for part in parts)


def test_a_limit_is_used_up() -> None:
    """Costs are not rounded: 14 parts that fill the limit exactly all get their better option."""
    rows = [[(0.0, 1.0), (333.3, 0.0)]] * 14
    chosen = knapsack(rows, lambda o: o[0], lambda o: o[1], 14 * 333.3, 2000)
    assert chosen == [(333.3, 0.0)] * 14
