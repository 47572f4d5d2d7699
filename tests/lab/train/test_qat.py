"""Quantization-aware training end to end on a tiny model, and its export as loaded by the engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from farthing.checkpoint.reader import Checkpoint
from farthing.compress.calibrate import SimulatedOps
from farthing.model.config import ModelConfig
from farthing.model.load import load
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import InputRounding, quantize_int4
from farthing_lab.train.evaluate import distillation, fused_distillation
from farthing_lab.train.export import load_checkpoint
from farthing_lab.train.finetune import perplexity
from farthing_lab.train.lsq import Precision
from farthing_lab.train.model import DeepSeekLM
from farthing_lab.train.qat import build, module_name, save_quantized, train_qat
from farthing_lab.train.qat_model import QatConfig, QatModel, parse_stages
from tests.lab.train.conftest import settings_of

STAGES = ((0.0, Precision(8, 8)), (0.3, Precision(4, 8)), (0.5, Precision(4, 4)))
QUIET = Console(quiet=True)


def test_distillation_is_the_kl_divergence_with_its_gradient() -> None:
    torch.manual_seed(0)
    head, teacher = torch.randn(50, 8), torch.randn(9, 8)
    targets = torch.randint(0, 50, (9,))
    for hard in (0.0, 0.4):
        hidden = torch.randn(9, 8, requires_grad=True)
        loss, rise = fused_distillation(hidden, head, teacher, targets, hard, chunk=4)
        p, q = (teacher @ head.T).softmax(-1), (hidden @ head.T).log_softmax(-1)
        kl = (p * ((teacher @ head.T).log_softmax(-1) - q)).sum(-1).mean()
        cross = torch.nn.functional.nll_loss(q, targets)
        expected = (1 - hard) * kl + hard * cross
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, hidden)[0],
            torch.autograd.grad(expected, hidden)[0],
            rtol=1e-4,
            atol=1e-6,
        )
        base = torch.nn.functional.nll_loss((teacher @ head.T).log_softmax(-1), targets)
        torch.testing.assert_close(rise, (cross - base).detach())


def test_training_recovers_the_rounding_loss(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    """The student's distance from its teacher, before and after (the random model predicts no text)."""
    config = QatConfig(stages=STAGES, group=32, block_steps=4, block_windows=8)
    settings = dataclasses.replace(settings_of(checkpoint, tmp_path / "run", sources), tokens=64 * 40)
    trainer, text, teacher = build(settings, config, QUIET)
    student = trainer.model
    assert isinstance(student, QatModel)
    probe = text.batches.next(4, 32)

    def distance() -> float:
        with torch.no_grad():
            return float(distillation(student.net, teacher, probe)["main"])

    student.start(Precision(4, 4))
    untrained = distance()
    student.start(Precision(16, 16))
    assert distance() < 0.25 * untrained  # the order of sums differs, and routing of a random model is sharp
    assert trainer.run()
    assert distance() < 0.9 * untrained


def test_command_writes_checkpoint_summary_and_plot(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    config = QatConfig(stages=((0.0, Precision(4, 4)),), group=32, block_steps=0)
    summary = train_qat(settings_of(checkpoint, tmp_path / "run", sources), config, console=QUIET)
    assert summary is not None and summary["precision"] == "W4A4"
    assert json.loads((tmp_path / "run" / "qat.json").read_text())["recovered"] == summary["recovered"]
    assert "sparsity" not in summary["config"]
    assert (tmp_path / "run" / "qat.png").stat().st_size > 1000
    assert (tmp_path / "run" / "checkpoint" / "config.json").is_file()


def test_interrupted_run_resumes_with_the_same_ranges(
    checkpoint: Path, tmp_path: Path, sources: Path
) -> None:
    config = QatConfig(stages=STAGES, group=32, block_steps=2, block_windows=4)

    def ranges(out: Path, pause: int | None) -> dict[str, torch.Tensor]:
        trainer, _, _ = build(settings_of(checkpoint, out, sources), config, QUIET)
        while trainer.progress < 1:
            if trainer.step == pause:
                trainer.save()
                trainer, _, _ = build(settings_of(checkpoint, out, sources), config, QUIET)
                trainer.load()
                pause = None
            trainer.train_step()
        return trainer.model.state_dict()

    whole, parted = ranges(tmp_path / "a", None), ranges(tmp_path / "b", 7)
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


def test_export_has_the_integers_of_training(checkpoint: Path, tmp_path: Path, sources: Path) -> None:
    net = load_checkpoint(checkpoint)
    student = QatModel(net, QatConfig(group=32))
    student.start(Precision(4, 4))
    net.eval()
    ids = torch.randint(3, 300, (1, 24))
    with torch.no_grad():
        net(ids)  # initializes the ranges
        for quantizer in student.products.modules():
            if hasattr(quantizer, "log_scale") and quantizer.log_scale.ndim == 0:
                quantizer.log_scale.fill_(-0.1)
    out = tmp_path / "exported"
    save_quantized(student, checkpoint, out)
    for name in student.weights():
        if name.endswith("kv_b_proj"):  # 8 bits in training, checked with the exact cache below
            student.product_of(name).input_quantizer.bits = 16
    with torch.no_grad():
        expected = net.logits(net(ids))[0]
    stored = Checkpoint.open(out)
    weight = stored.weight("model.layers.1.mlp.experts.3.down_proj")
    assert weight.inputs is not None and weight.inputs.bits == 4
    assert weight.inputs.clip == pytest.approx(0.9048, abs=1e-3)
    torch.testing.assert_close(
        weight.dequantize(),
        student.product_of("layers.1.mlp.down").weight_quantizer(net.layers[1].mlp.down)[3].detach(),
    )
    model = load(out, SimulatedOps(out))
    cache = model.new_cache(2, 16, "float32")
    hidden = model.forward(ids[0], make_batch([24], [0], [range(2)], 16), cache)
    found = model.logits(hidden)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_only_supported_formats_are_exported(checkpoint: Path, tmp_path: Path) -> None:
    student = QatModel(load_checkpoint(checkpoint), QatConfig(group=32))
    student.start(Precision(8, 8))
    with pytest.raises(ValueError, match="got W8A8 by group; expected W4A4 or W4A8 by group"):
        save_quantized(student, checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("layers.2.mlp.down", "model.layers.2.mlp.down"),
        ("mtp.eh_proj", "model.layers.5.eh_proj"),
        ("mtp.block.self_attn.o_proj", "model.layers.5.self_attn.o_proj"),
    ],
)
def test_checkpoint_names(name: str, module: str) -> None:
    assert module_name(name, 5) == module


def test_stages_are_parsed_and_validated() -> None:
    assert parse_stages("0:W8A8, 0.5:W4A4") == ((0.0, Precision(8, 8)), (0.5, Precision(4, 4)))
    with pytest.raises(ValueError, match="expected START:W<bits>A<bits>"):
        parse_stages("W4A4")
    with pytest.raises(ValueError, match="first to start at 0"):
        QatConfig(stages=parse_stages("0.5:W4A4"))


@pytest.mark.parametrize("group", [1, 16, 48, 128])
def test_groups_without_kernels_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match=f"group: got {group}; expected 32 or 64"):
        QatConfig(group=group)


def test_a_record_states_sparsity_only_with_blocks() -> None:
    assert "sparsity" not in QatConfig().recorded() and "prune_span" not in QatConfig().recorded()
    assert QatConfig(block=(16, 16), sparsity=0.3).recorded()["sparsity"] == 0.3


def test_the_float_model_learns_nothing_from_itself(checkpoint: Path) -> None:
    """Why pure distillation needs no float control."""
    net, teacher = (load_checkpoint(checkpoint) for _ in range(2))
    for model in (net, teacher):
        model.set_compute_dtype(torch.bfloat16)
    losses = distillation(net, teacher, torch.randint(3, 300, (2, 33)), mtp_weight=0.0)
    losses["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_perplexity_of_a_uniform_model_is_its_vocabulary(tiny: ModelConfig) -> None:
    model = DeepSeekLM(dataclasses.replace(tiny, num_nextn_predict_layers=0))
    torch.nn.init.zeros_(model.embed_tokens)
    ids = torch.randint(0, tiny.vocab_size, (50,)).numpy().astype("uint16")
    assert perplexity(model, [ids], 16, 1000) == pytest.approx(tiny.vocab_size, rel=1e-4)


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_cpu_kernels_round_inputs_like_training(clip: float, tokens: int) -> None:
    native = pytest.importorskip("farthing._native")
    if not hasattr(native.Packed, "round_inputs"):
        pytest.skip("the installed kernels are older than 4-bit inputs")
    torch.manual_seed(0)
    inputs = InputRounding(4, clip)
    weight = dataclasses.replace(quantize_int4(torch.randn(48, 128)), inputs=inputs)
    ops = select("cpu", threads=1)
    handle = ops.pack_linear("w", lambda: [weight])
    x = torch.randn(tokens, 128)
    exact = inputs(x, 64) @ weight.dequantize().T
    found = ops.linear(x, handle)
    assert float((found - exact).norm() / exact.norm()) < 2e-3  # group scales are float16
    eight = ops.linear(x, ops.pack_linear("w8", lambda: [dataclasses.replace(weight, inputs=None)]))
    assert float((eight - exact).norm() / exact.norm()) > 0.02


def test_packed_file_keeps_the_rounding_of_inputs(tmp_path: Path) -> None:
    native = pytest.importorskip("farthing._native")
    if not hasattr(native.Packed, "round_inputs"):
        pytest.skip("the installed kernels are older than 4-bit inputs")
    torch.manual_seed(0)
    weight = dataclasses.replace(quantize_int4(torch.randn(32, 64)), inputs=InputRounding(4, 0.9))
    ops = select("cpu", threads=1)
    handle = ops.pack_linear("w", lambda: [weight])
    ops.save_packed(str(tmp_path / "packed.bin"))
    again = select("cpu", threads=1, packed=str(tmp_path / "packed.bin"))
    x = torch.randn(3, 64)
    stored = again.pack_linear("w", lambda: [])
    assert torch.equal(again.linear(x, stored), ops.linear(x, handle))
