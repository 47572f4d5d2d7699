"""Training ResNet-50 on class folders, then 4-bit weights and activations with 16 x 16 block sparsity.

Batch norms are folded before quantization. Weights: 4 bits, a learned scale for 64 columns. Inputs of every
convolution but the first are never negative (a ReLU made them): 4 bits without sign, a scale a pixel and 64
channels with a learned clip, as the CPU kernels compute it. First convolution and classifier keep 8 bits.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench.resnet50 import data
from bench.resnet50.model import ResNet50
from rich.console import Console
from torch import Tensor, nn

from farthing.compress.module import fold_batch_norms, replace_module
from farthing.compress.prune.masks import mask, scores
from farthing.compress.prune.schedule import cubic_sparsity
from farthing.train.loop import BaseHook, LoopConfig, Schedule, Trainer
from farthing.train.lsq import ActivationQuantizer, WeightQuantizer

GROUP = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run of either kind."""

    data: Path
    out: Path
    size: int = 64
    epochs: float = 12.0
    batch: int = 128
    lr: float = 0.05
    seed: int = 0
    threads: int = 2
    device: str = "cpu"
    limit: int | None = None  # pictures a class
    sparsity: float = 0.4
    teach: float = 0.7  # share of the quantized net's loss that is the float net's answer


class QuantConv2d(nn.Module):
    """A convolution whose matrix [O, kh kw C] and inputs lie on the grids the kernels use."""

    def __init__(self, conv: nn.Conv2d, first: bool) -> None:
        super().__init__()
        assert conv.bias is not None
        self.stride, self.padding = conv.stride, conv.padding
        self.kernel = (conv.kernel_size[0], conv.kernel_size[1])
        # [O, kh, kw, C]: the channels of a pixel stand together, as in the kernels' rows
        self.weight = nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).contiguous())
        self.bias = nn.Parameter(conv.bias.detach().clone())
        columns = self.weight[0].numel()
        self.weights = WeightQuantizer(
            torch.Size((1, len(self.weight), columns)), columns if first else GROUP
        )
        self.inputs = ActivationQuantizer("group", GROUP, unsigned=not first)
        self.first = first
        self.weights.start(self.matrix()[None], 8 if first else 4)
        self.inputs.start(8 if first else 4)
        self.register_buffer("keep", torch.ones(len(self.weight), columns, dtype=torch.bool))

    def matrix(self) -> Tensor:
        """[O, kh kw C], unmasked."""
        return self.weight.detach().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        b, c, h, w = x.shape
        x = self.inputs(rows).view(b, h, w, c).permute(0, 3, 1, 2)
        keep: Any = self.keep
        matrix = self.weights((self.weight.flatten(1) * keep)[None])[0]
        weight = matrix.view(-1, *self.kernel, c).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def quantized(net: nn.Module, size: int) -> nn.Module:
    """A copy with folded norms and quantized convolutions."""
    net = fold_batch_norms(net, torch.zeros(1, 3, size, size))
    convs = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    for i, (name, conv) in enumerate(convs):
        replace_module(net, name, QuantConv2d(conv, first=i == 0))
    return net


class SparsityHook(BaseHook):
    """Drops 16 x 16 blocks of every convolution but the first on a cubic schedule, by their energy."""

    def __init__(self, final: float, every: int = 20) -> None:
        self.final, self.every = final, every

    def before_step(self, trainer: Trainer) -> None:
        """New masks; blocks may come back while the schedule runs."""
        if trainer.step % self.every:
            return
        share = cubic_sparsity(int(1e6 * trainer.progress), 0, 600_000, self.final)
        for module in trainer.model.modules():
            if isinstance(module, QuantConv2d) and not module.first:
                module.keep = mask(scores(module.matrix(), None, "magnitude").square(), share, "16x16")
        trainer.metrics["sparsity"] = share


@torch.no_grad()
def top1(net: nn.Module, pictures: data.Pictures, device: str, batch: int = 100) -> Tensor:
    """Which pictures are right, bool [N]."""
    net.eval()
    right = []
    for start in range(0, len(pictures.labels), batch):
        part = slice(start, start + batch)
        images = data.normalize(pictures.images[part].to(device))
        right.append(net(images).argmax(1).cpu() == pictures.labels[part])
    return torch.cat(right)


def train(settings: Settings, teacher: nn.Module | None, resume: bool, console: Console) -> nn.Module | None:
    """The float net, or with a teacher its quantized, sparse student. None when interrupted."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    cache = settings.out.parent / "pictures"
    pictures = data.load(settings.data, "train", settings.size, cache, settings.limit)
    test = data.load(settings.data, "test", settings.size, cache, settings.limit)
    batches = data.Batches(pictures, settings.batch, settings.seed)
    net: nn.Module = ResNet50(len(pictures.classes))
    if teacher is not None:
        net = quantized(teacher, settings.size)
        teacher = teacher.to(settings.device).eval()
    net.to(settings.device)
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": 5e-4 if teacher is None else 0.0},
        {"params": rest},
    ]
    optimizer = torch.optim.SGD(
        groups,
        lr=settings.lr if teacher is None else settings.lr / 20,
        momentum=0.9,
        nesterov=True,
    )

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor], trainer: Trainer) -> dict[str, Tensor]:
        images, labels = (t.to(settings.device) for t in batch)
        answer = module(images)
        value = F.cross_entropy(answer, labels, label_smoothing=0.0 if teacher is not None else 0.05)
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(images).log_softmax(-1)
            distance = F.kl_div(answer.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            value = (1 - settings.teach) * value + settings.teach * distance
        return {"loss": value}

    config = LoopConfig(
        settings.out, None, max(1, math.ceil(settings.epochs * len(pictures.labels))),
        schedule=Schedule(warmup=0.05, decay=0.9), clip=5.0, threads=settings.threads,
        wall_clock=settings.device != "cpu",
    )  # fmt: skip
    trainer = Trainer(
        net, [optimizer], batches, lambda t: [(batches.next(), settings.batch)], loss, config,
        [SparsityHook(settings.sparsity)] if teacher is not None else [],
        evaluate=lambda t: {"top1": float(top1(t.model, test, settings.device).float().mean())},
        console=console,
    )  # fmt: skip
    if resume:
        trainer.load()
    if not trainer.run():
        return None
    torch.save(net.state_dict(), settings.out / "net.pt")
    torch.save(top1(net, test, settings.device), settings.out / "right.pt")
    return net.eval()
