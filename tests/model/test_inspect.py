"""Per-token costs against manual counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from farthing.checkpoint.reader import Checkpoint
from farthing.model.config import ModelConfig
from farthing.model.inspect import checkpoint_cost, model_cost, routing_report
from farthing.model.load import random_model
from farthing.model.parameters import random_parameters
from farthing.ops.select import select
from farthing.planner.footprint import stored_by_checkpoint
from tests.tiny import SMALL_V3, V3


def test_v3_matches_the_published_size() -> None:
    cost = model_cost(ModelConfig.from_json(V3))
    assert cost.total_parameters == pytest.approx(671e9, rel=0.001)
    assert cost.active_parameters == pytest.approx(37e9, rel=0.02)
    assert cost.mtp_parameters == pytest.approx(11.5e9, rel=0.02)
    assert cost.kv_bytes_per_token == 70_272
    assert cost.compute_saved > 0.9


def test_tiny_model_matches_manual_counts() -> None:
    cost = model_cost(ModelConfig.from_json(SMALL_V3))
    attention = 12 * 16 + 16 * 12 + 12 * 16 + 16 * 8 + 16 * 8  # q_a, q_b, kv_a, kv_b, o
    expert = 3 * 16 * 8
    norms = 3 * (16 + 12 + 8 + 16) + 16
    shared = 3 * attention + 3 * 16 * 24 + 2 * (expert + 8 * 16 + 8) + norms + 40 * 16
    assert cost.total_parameters == shared + 2 * 8 * expert + 40 * 16
    assert cost.active_parameters == shared + 2 * 2 * expert + 16
    assert cost.flops_per_token == 2 * (shared + 2 * 2 * expert - norms - 2 * 8)


def test_stored_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_V3))
    tensors = {n: t.to(torch.bfloat16) for n, t in random_parameters(ModelConfig.from_json(SMALL_V3)).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = checkpoint_cost(tmp_path)
    assert stored.weight_bytes == sum(t.nbytes for t in tensors.values())
    assert stored.active_bytes == model_cost(ModelConfig.from_json(SMALL_V3)).active_bytes


@pytest.mark.parametrize("name", ["granitemoe", "qwen3_moe"])
def test_stored_bytes_of_stacked_experts(name: str, tmp_path: Path) -> None:
    """Granite's stacks have names of their own."""
    pytest.importorskip("transformers")
    from tests.parity.families import build

    build(name, 1, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    cost = checkpoint_cost(tmp_path)
    assert cost.weight_bytes == pytest.approx(sum(map(checkpoint.nbytes, checkpoint.names())), rel=1e-3)
    of = stored_by_checkpoint(tmp_path)
    assert of("model.layers.1.mlp.experts.0.down_proj.weight").kind == "float32"


def test_routing_report_counts_every_choice() -> None:
    model = random_model(ModelConfig.from_json(SMALL_V3), select("reference"))
    report = routing_report(model, [[1, 2, 3, 4], [5], []])
    assert report.tokens == 5
    assert [sum(r) for r in report.tokens_per_expert] == [10, 10]
    assert report.experts_per_token == 2
    assert report.compute_saved == pytest.approx(model_cost(model.config).compute_saved)
    with pytest.raises(ValueError, match="no token"):
        routing_report(model, [[]])
