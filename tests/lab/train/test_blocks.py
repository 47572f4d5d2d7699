"""Zero blocks learned while training: which ones go, and that they stay zero in the checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console

from farthing.checkpoint.reader import Checkpoint
from farthing.ops.weights import blocks_per_cell
from farthing_lab.train.export import load_checkpoint
from farthing_lab.train.lsq import Precision, WeightQuantizer
from farthing_lab.train.qat import build, train_qat
from farthing_lab.train.qat_model import (
    QatConfig,
    QatModel,
    block_costs,
    masked,
    prune_blocks,
    squared_gradients,
    zero_share,
)
from tests.lab.train.conftest import learn, settings_of

QUIET = Console(quiet=True)
STAGES = ((0.0, Precision(16, 16)), (0.6, Precision(4, 8)))
CONFIG = QatConfig(
    stages=STAGES, group=32, block=(16, 16), prune_every=2, fisher_windows=4, block_steps=2, block_windows=4
)


def test_costs_are_second_order_estimates_of_the_loss() -> None:
    torch.manual_seed(0)
    w, fisher = torch.randn(1, 32, 64), torch.rand(1, 32, 64)
    keep = torch.ones(1, 2, 4)
    keep[0, 1, 2] = 0
    costs = block_costs(w, fisher, keep)
    assert costs[0, 1, 2] == 0
    expected = (w[0, :16, 16:32].square() * fisher[0, :16, 16:32]).sum()
    torch.testing.assert_close(costs[0, 0, 1], expected)
    assert int(costs.isinf().sum()) == 1  # of eight blocks one always remains


def test_blocks_with_the_least_cost_are_removed_first(checkpoint: Path) -> None:
    net = load_checkpoint(checkpoint)
    with torch.no_grad():
        net.layers[1].mlp.down[2, :16, :16] *= 1e-3
    student = QatModel(net, CONFIG)
    fisher = {name: torch.ones_like(p) for name, p in net.named_parameters() if "mlp." in name}
    blocks = sum(keep.numel() for name, keep in masked(student).items() if not name.startswith("mtp."))
    prune_blocks(student, fisher, 1.2 / blocks)
    removed = {
        name: keep.eq(0).nonzero().tolist() for name, keep in masked(student).items() if keep.eq(0).any()
    }
    assert removed.pop("layers.1.mlp.down") == [[2, 0, 0]]
    assert all(name.startswith("mtp.") for name in removed)  # drafting layers lose their own share
    prune_blocks(student, fisher, 0.4)
    assert zero_share(student) == pytest.approx(0.4, abs=0.02)
    assert not masked(student)["layers.1.mlp.down"][2, 0, 0]


def test_gradients_of_a_parameter_are_squared_by_window(checkpoint: Path) -> None:
    net = load_checkpoint(checkpoint)
    tokens = torch.randint(3, 300, (3, 17))
    found = squared_gradients(net, tokens)
    weight = net.layers[1].mlp.down
    expected = torch.zeros_like(weight)
    for window in tokens.split(1):
        (grad,) = torch.autograd.grad(net.loss(window, mtp_weight=0.3)["loss"], weight)
        expected += grad.square() / 3
    torch.testing.assert_close(found["layers.1.mlp.down"], expected)
    assert all(p.grad is None for p in net.parameters())


def test_masked_weights_stay_zero_and_get_no_gradient() -> None:
    torch.manual_seed(0)
    w = torch.randn(1, 32, 64, requires_grad=True)
    quantizer = WeightQuantizer(w.shape, 32, (16, 16))
    assert quantizer.keep is not None
    quantizer.keep[0, 1, 3] = 0
    for bits in (16, 4):
        quantizer.start(w, bits)
        out = quantizer(w)
        assert not out[0, 16:, 48:].any() and out[0, :16].any()
        (grad,) = torch.autograd.grad(out.square().sum(), w)
        assert not grad[0, 16:, 48:].any() and grad[0, 16:, :48].any()
    assert not quantizer.integers(w)[0][0, 16:, 48:].any()
    with pytest.raises(ValueError, match="blocks of 16x48 do not tile"):
        WeightQuantizer(w.shape, 32, (16, 48))


def test_pruned_checkpoint_has_the_zero_blocks(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    out = tmp_path / "run"
    learn(checkpoint, settings_of(checkpoint, tmp_path / "learned", sources))
    summary = train_qat(settings_of(checkpoint, out, sources), CONFIG, console=QUIET)
    assert summary is not None
    assert summary["zero_blocks"]["zero_share"] == pytest.approx(0.4, abs=0.02)
    share = summary["needed_blocks"]["share"]
    assert share["before"] == pytest.approx(0.7, abs=0.01) and 0 < share["after"] < 1
    assert share["random"] == 0
    stored, kept, cells = Checkpoint.open(out / "checkpoint"), 0.0, 0
    for name in ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"):
        value = stored.weight(f"model.layers.1.{name}").dequantize()
        counts = blocks_per_cell(value != 0, 32)
        kept, cells = kept + float(counts.sum()), cells + 2 * counts.numel()
    share = summary["zero_blocks"]["by_projection"]
    expected = (
        share["layers.1.mlp.shared_experts.gate_proj"] + share["layers.1.mlp.shared_experts.up_proj"]
    ) / 2
    assert 1 - kept / cells >= expected - 1e-3  # rounding may clear further blocks


def test_resumed_run_keeps_its_masks(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    settings = settings_of(checkpoint, tmp_path / "run", sources)
    trainer, _, _ = build(settings, dataclasses.replace(CONFIG, block_steps=0), QUIET)
    while trainer.progress < 0.5:
        trainer.train_step()
    trainer.save()
    again, _, _ = build(settings, dataclasses.replace(CONFIG, block_steps=0), QUIET)
    again.load()
    for one in (trainer, again):
        one.train_step()
    assert isinstance(trainer.model, QatModel) and isinstance(again.model, QatModel)
    assert zero_share(trainer.model) > 0.2
    found = masked(again.model)
    assert all(torch.equal(keep, found[name]) for name, keep in masked(trainer.model).items())
