"""Quantization-aware training of a trained checkpoint: W8A8, then W4A8, then W4A4.

Inputs are smoothed first (`smoothing.py`), which changes no output. Every projection gets learned weight
scales and rounded inputs (`lsq.py`). Each change of bits starts block by block: each layer learns to
reproduce the float layer's outputs from the quantized layers' inputs (as BRECQ, Li et al. 2021). Then all
layers train end to end on the float model's next-token distributions.

Shapes: B windows, T positions, D hidden.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from farthing.train.distill import distillation
from farthing.train.export import load_checkpoint
from farthing.train.finetune import Settings, Text, adam, freeze_top, perplexity
from farthing.train.loop import BaseHook, LoopConfig, Schedule, Trainer
from farthing.train.lsq import Kind, Precision, QuantizedProduct
from farthing.train.model import DeepSeekLM, MoE
from farthing.train.smoothing import smooth

log = logging.getLogger(__name__)

SMOOTHING_WINDOWS = 16  # of text to measure inputs on


@dataclasses.dataclass(frozen=True)
class QatConfig:
    """Stages are (progress from which they apply, bits)."""

    stages: tuple[tuple[float, Precision], ...] = (
        (0.0, Precision(8, 8)),
        (0.06, Precision(4, 8)),
        (0.25, Precision(4, 4)),
    )
    group: int = 64  # columns per weight scale, and per input range if inputs is "group"
    inputs: Kind = "group"
    smoothing: float = 0.5  # of inputs, before rounding; 0 is off
    weight_lr: float = 4e-4
    norm_lr: float = 1e-3
    scale_lr: float = 3e-3
    block_steps: int = 8  # per layer at each change of bits
    block_windows: int = 16
    block_tokens: int = 2048  # per step
    hard: float = 0.0  # weight of the text's cross entropy in the loss; the rest is distillation
    mtp_weight: float = 0.3
    mtp_share: float = 0.25

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0][0] != 0.0:
            raise ValueError(f"stages: got {self.stages}; expected the first to start at 0.0")
        for name in ("hard", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a share in [0, 1]")

    def stage(self, progress: float) -> int:
        """Index of the current stage."""
        return max(i for i, (start, _) in enumerate(self.stages) if progress >= start)


def parse_stages(text: str) -> tuple[tuple[float, Precision], ...]:
    """'0:W8A8,0.2:W4A4' -> stages. Raises ValueError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\d.]+):W(\d+)A(\d+)\s*", part)
        if match is None:
            raise ValueError(f"stage {part!r}: expected START:W<bits>A<bits>, for example 0.2:W4A4")
        found.append((float(match[1]), Precision(int(match[2]), int(match[3]))))
    return tuple(found)


class QatModel(nn.Module):
    """The student and its quantizers in one state dict."""

    def __init__(self, net: DeepSeekLM, config: QatConfig) -> None:
        super().__init__()
        self.net, self.config = net, config
        self.products = nn.ModuleDict()
        for name, module in net.projections():
            if isinstance(module, MoE):
                first = self._add(f"{name}.gate_up", module.gate_up.flatten(1, 2))
                second = self._add(f"{name}.down", module.down)
                module.products = (first.forward, second.forward)
            else:
                module.product = self._add(name, module.weight[None]).forward

    def _add(self, name: str, weight: Tensor) -> QuantizedProduct:
        # Inputs of down projections are one-sided after SiLU: LSQ+ gives them an offset.
        offset = name.endswith(("down", "down_proj"))
        made = QuantizedProduct(weight, self.config.group, self.config.inputs, offset)
        self.products[name.replace(".", "/")] = made
        return made

    def weights(self) -> dict[str, Tensor]:
        """Weights [B, R, J] of every product, by name."""
        found: dict[str, Tensor] = {}
        for name, module in self.net.projections():
            if isinstance(module, MoE):
                found |= {f"{name}.gate_up": module.gate_up.flatten(1, 2), f"{name}.down": module.down}
            else:
                found[name] = module.weight[None]
        return found

    def product_of(self, name: str) -> QuantizedProduct:
        """The quantized product with that name."""
        found = self.products[name.replace(".", "/")]
        assert isinstance(found, QuantizedProduct)
        return found

    def start(self, precision: Precision, prefix: str = "") -> None:
        """Start a stage for every product under `prefix`."""
        for name, weight in self.weights().items():
            if name.startswith(prefix):
                self.product_of(name).start(weight.detach(), _bits_of(name, precision))

    def resume(self, precision: Precision) -> None:
        """Resume a stage whose ranges were loaded."""
        for name in self.weights():
            self.product_of(name).resume(_bits_of(name, precision))


def _bits_of(name: str, precision: Precision) -> Precision:
    """The input of the latent's up-projection keeps 8 bits: it is the cache, which is never 4-bit."""
    if name.endswith("kv_b_proj"):
        return Precision(precision.weights, max(8, precision.activations))
    return precision


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
        self.stage = wanted
        precision = student.config.stages[wanted][1]
        if student.config.block_steps:
            window = self.settings.window
            batch = self.text.batches.next(student.config.block_windows, window)[:, :-1]
            errors = learn_blocks(student, self.teacher, batch.to(self.settings.device), precision)
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


def build(settings: Settings, config: QatConfig, console: Console) -> tuple[Trainer, Text, DeepSeekLM]:
    """A trainer ready to run or load, its text, and the float teacher."""
    torch.manual_seed(settings.seed)
    text = Text.load(settings)
    teacher = load_checkpoint(settings.model).eval()
    teacher.set_compute_dtype(torch.bfloat16)
    net = copy.deepcopy(teacher)
    smooth(net, text.batches.next(SMOOTHING_WINDOWS, settings.window), config.smoothing)
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

    hooks = [StageHook(teacher, text, settings, console)]
    trainer = Trainer(
        student, [optimizer], text.batches, lambda t: text.micro_batches(settings), loss,
        loop, hooks, evaluate=score, console=console,
    )  # fmt: skip
    return trainer, text, teacher
