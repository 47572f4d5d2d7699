"""Quantization-aware training of a trained checkpoint, to W4A4 or in stages of falling bits.

Inputs are smoothed first (`smoothing.py`), which changes no output. Every projection gets learned weight
scales and rounded inputs (`lsq.py`). Weights reach 4 bits by GPTQ (`gptq.py`), and each change of bits starts
block by block: each layer learns to reproduce the float layer's outputs from the quantized layers' inputs (as
BRECQ, Li et al. 2021). Then all layers train end to end on the float model's next-token distributions.

Shapes: B windows, T positions, D hidden.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from farthing.train.blocks import BlockHook, squared_gradients
from farthing.train.distill import distillation
from farthing.train.export import load_checkpoint
from farthing.train.finetune import Settings, Sources, Text, adam, freeze_top, perplexity
from farthing.train.gptq import round_by_gptq
from farthing.train.loop import BaseHook, LoopConfig, Schedule, Trainer
from farthing.train.lsq import Precision
from farthing.train.model import DeepSeekLM
from farthing.train.qat_model import QatConfig, QatModel
from farthing.train.smoothing import smooth

SMOOTHING_WINDOWS = 16  # of text to measure inputs on


def learn_blocks(student: QatModel, teacher: DeepSeekLM, tokens: Tensor, precision: Precision) -> list[float]:
    """Layer by layer, on tokens [B, T]: lower the bits, then learn the float layer's output.

    Returns each layer's relative squared error after learning.
    """
    config, net = student.config, student.net
    turn = net.turn[: tokens.shape[1]]
    per_step = max(1, config.block_tokens // tokens.shape[1])
    errors: list[float] = []
    with torch.no_grad():
        theirs = nn.functional.embedding(tokens, teacher.embed_tokens)
    ours = theirs
    net.train(False)
    for i, (layer, float_layer) in enumerate(zip(net.layers, teacher.layers, strict=True)):
        with torch.no_grad():
            theirs = float_layer(theirs, turn)
        prefix = f"layers.{i}."
        student.start(precision, prefix)
        scales = [p for n, p in student.products.named_parameters() if n.startswith(prefix.replace(".", "/"))]
        weights = [p for p in layer.parameters() if p.requires_grad]
        optimizer = adam(
            [{"params": weights, "lr": config.weight_lr}, {"params": scales, "lr": config.scale_lr}]
        )
        power = theirs.square().mean()
        for step in range(config.block_steps):
            rows = torch.arange(step * per_step, (step + 1) * per_step) % len(tokens)
            for group, lr in zip(optimizer.param_groups, (config.weight_lr, config.scale_lr), strict=True):
                group["lr"] = lr * (1 - step / config.block_steps)
            optimizer.zero_grad()
            loss = (layer(ours[rows], turn) - theirs[rows]).square().mean() / power
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            ours = torch.cat([layer(part, turn) for part in ours.split(4)])
            errors.append(float((ours - theirs).square().mean() / power))
    student.start(precision)
    return errors


class StageHook(BaseHook):
    """Lowers the bits when a stage begins and learns block by block before training continues."""

    def __init__(self, teacher: DeepSeekLM, text: Text, settings: Settings, console: Console) -> None:
        self.teacher, self.text, self.settings, self.console = teacher, text, settings, console
        self.stage, self.loaded = -1, False

    def before_step(self, trainer: Trainer) -> None:
        """Start the stage for the current progress, if not yet started."""
        student = trainer.model
        assert isinstance(student, QatModel)
        wanted = student.config.stage(trainer.progress)
        if self.loaded:
            student.resume(student.config.stages[self.stage][1])
            self.loaded = False
        if wanted == self.stage:
            return
        before = student.config.stages[self.stage][1].weights if self.stage >= 0 else 16
        self.stage = wanted
        precision = student.config.stages[wanted][1]
        batch = self.text.batches.next(student.config.block_windows, self.settings.window)[:, :-1]
        batch = batch.to(self.settings.device)
        if student.config.gptq and before > precision.weights == 4:
            round_by_gptq(student, batch, precision)
        if student.config.block_steps and precision != Precision(16, 16):
            errors = learn_blocks(student, self.teacher, batch, precision)
            self.console.print(f"{precision}: error by layer " + " ".join(f"{e:.4f}" for e in errors))
        else:
            student.start(precision)

    def after_step(self, trainer: Trainer) -> None:
        """Record the bits."""
        assert isinstance(trainer.model, QatModel)
        precision = trainer.model.config.stages[self.stage][1]
        trainer.metrics["weight_bits"] = precision.weights
        trainer.metrics["activation_bits"] = precision.activations

    def state_dict(self) -> dict[str, Any]:
        """The stage. It determines the bits; ranges are in the model's state."""
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the stage without learning its blocks again."""
        self.stage, self.loaded = state["stage"], True


def build(
    settings: Settings, config: QatConfig, console: Console, sources: Sources | None = None
) -> tuple[Trainer, Text, DeepSeekLM]:
    """A trainer ready to run or load, its text, and the float teacher."""
    torch.manual_seed(settings.seed)
    text = Text.load(settings, console, sources)
    teacher = load_checkpoint(settings.model).eval()
    teacher.set_compute_dtype(torch.bfloat16)
    net = copy.deepcopy(teacher)
    smooth(net, text.batches.next(SMOOTHING_WINDOWS, settings.window), config.smoothing)
    net.to(settings.device)
    hooks: list[BaseHook] = []
    if config.block is not None:
        windows = text.batches.next(config.fisher_windows, settings.window).to(settings.device)
        hooks.append(BlockHook(squared_gradients(net, windows)))
    student = QatModel(net, config)
    student.to(settings.device)
    teacher.to(settings.device)
    freeze_top(student.net)
    weights = [p for p in student.net.parameters() if p.requires_grad]
    optimizer = adam(
        [
            {"params": [p for p in weights if p.ndim > 1], "lr": config.weight_lr},
            {"params": [p for p in weights if p.ndim < 2], "lr": config.norm_lr},
            {"params": list(student.products.parameters()), "lr": config.scale_lr},
        ]
    )
    loop = LoopConfig(
        settings.out, None, settings.tokens, Schedule(warmup=0.02, decay=0.7), threads=settings.threads,
        eval_minutes=1.5, save_minutes=1.5,
    )  # fmt: skip

    def loss(module: nn.Module, tokens: Tensor, trainer: Trainer) -> dict[str, Tensor]:
        assert isinstance(module, QatModel)
        return distillation(module.net, teacher, tokens, config.hard, config.mtp_weight, config.mtp_share)

    def score(trainer: Trainer) -> dict[str, float]:
        assert isinstance(trainer.model, QatModel)
        value = perplexity(trainer.model.net, text.heldout, settings.window, settings.eval_tokens)
        return {"perplexity": value}

    hooks.append(StageHook(teacher, text, settings, console))
    trainer = Trainer(
        student, [optimizer], text.batches, lambda t: text.micro_batches(settings), loss,
        loop, hooks, evaluate=score, console=console,
    )  # fmt: skip
    return trainer, text, teacher
