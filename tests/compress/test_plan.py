"""The automatic plan on tiny models: a budget kept, zero blocks taken where they are free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from farthing.checkpoint import Checkpoint, CheckpointWriter
from farthing.compress.api import Options, compress
from farthing.compress.recipe import RECIPES

SMALL = 600  # calibration tokens


def test_auto_meets_a_byte_budget_and_gets_better_with_more(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    options = Options(calibration=data, data=data, window=64)
    drops, sizes = [], []
    for i, budget in enumerate((200_000, 300_000)):
        recipe = replace(RECIPES["auto"], budget_bytes=budget, calibration_tokens=SMALL)
        outcome = compress(model_dir, tmp_path / str(i), recipe, options)
        assert outcome.report.plan is not None and outcome.report.plan["bytes"] <= budget
        assert "least predicted loss" in outcome.report.plan["explanation"]
        drops.append(outcome.report.quality.kl)  # type: ignore[union-attr]
        sizes.append(outcome.report.size_after)
    assert sizes[0] < sizes[1] and drops[0] > drops[1]


def with_empty_blocks(source: Path, out: Path) -> Path:
    """A copy in which half of the 16x16 blocks of every feed-forward are next to nothing, a checkerboard."""
    checkpoint, writer = Checkpoint.open(source), CheckpointWriter(out)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if ".mlp." in name and name.endswith("_proj.weight"):
            rows, columns = (torch.arange(n) // 16 for n in tensor.shape)
            tensor = tensor * torch.where((rows[:, None] + columns) % 2 == 0, 1.0, 1e-5)
        writer.add(name, tensor)
    writer.close(checkpoint.config, copy_from=source)
    return out


def test_auto_takes_zero_blocks_where_they_cost_nothing_and_only_there(
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
        assert all("KL int4, 50% of blocks zero" in row for row in report.plan["choices"])
    assert "chosen in none: the cheapest costs" in full.plan["explanation"]  # type: ignore[index]
    assert not any(m["sparsity"] for m in full.modules)
    assert "chosen in 5" in half.plan["explanation"]  # type: ignore[index]
    assert half.plan["bytes"] < full.plan["bytes"]  # type: ignore[index]
    cut = [m for m in half.modules if ".mlp." in m["module"] and ".layers.3." not in m["module"]]
    assert cut and sum(m["sparsity"] for m in cut) / len(cut) > 0.35
    assert not any(m["sparsity"] for m in half.modules if m not in cut)  # attention and the MTP layer
    formats = {m["module"]: m["format"] for m in half.modules}
    assert formats["model.layers.3.eh_proj"] == "int8"  # no other layer has one
    for module in ("self_attn.o_proj", "mlp.experts.0.up_proj"):  # drafts follow the last layer
        assert formats[f"model.layers.3.{module}"] == formats[f"model.layers.2.{module}"]
    checkpoint = Checkpoint.open(tmp_path / "1")
    up = checkpoint.weight("model.layers.0.mlp.up_proj").dequantize()
    assert not up[:16, 16:32].any() and bool(up[:16, :16].any())
