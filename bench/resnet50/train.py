"""Training: a float ResNet-50 on class folders, small pictures first, then its quantized, sparse student, and
the control: the float net trained further as long as the student, with the same loss and optimizer.

On a CPU the products run in bfloat16 (autocast), channels last; parameters, norms and losses are float32.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench.resnet50 import data
from bench.resnet50.engine import Engine
from bench.resnet50.model import ResNet50
from bench.resnet50.quantize import QuantResNet50, Range
from rich.console import Console
from torch import Tensor, nn

from farthing_lab.compress.masks import cubic_sparsity
from farthing_lab.train.loop import BaseHook, LoopConfig, Schedule, Trainer
from farthing_lab.train.lsq import compile_rounding

Loss = Callable[[nn.Module, tuple[Tensor, Tensor], Trainer], dict[str, Tensor]]
CURVE = 5  # curves use every fifth test picture, results all of them


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of all runs."""

    data: Path
    out: Path
    size: int = 64  # side in pixels, at the end and in the test
    stored: int = 32  # side of the decoded pictures
    small: int = 32  # side in the first `small_epochs`
    small_epochs: float = 6.0
    epochs: float = 1.0  # at `size`, afterwards
    student_epochs: float = 0.8
    batch: int = 128
    lr: float = 0.1
    student_lr: float = 8e-4
    seed: int = 0
    threads: int = 2
    device: str = "cpu"
    limit: int | None = None  # pictures per class
    sparsity: float = 0.4
    teach: float = 0.8  # share of the distillation term in the student's loss


class Run:
    """The common parts of the runs: pictures, arithmetic, training loop."""

    def __init__(self, settings: Settings, part: str) -> None:
        self.settings, self.out = settings, settings.out / part
        torch.manual_seed(settings.seed)
        torch.set_num_threads(settings.threads)
        cache = settings.out / "pictures"
        self.train = data.load(settings.data, "train", settings.stored, cache, settings.limit)
        self.test = data.load(settings.data, "test", settings.stored, cache, settings.limit)
        self.batches = data.Batches(self.train, settings.batch, settings.seed)

    def arithmetic(self) -> torch.autocast:
        """bfloat16 products."""
        return torch.autocast(torch.device(self.settings.device).type, torch.bfloat16)

    def size(self, trainer: Trainer) -> int:
        """Side in pixels at this step of the float run."""
        s = self.settings
        return s.small if trainer.tokens < s.small_epochs * len(self.train.labels) else s.size

    def loop(self, net: nn.Module, optimizer: Any, loss: Any, epochs: float, size: Any, **more: Any) -> bool:
        """Train, resuming if possible; False if interrupted."""
        s = self.settings
        some = data.Pictures(self.test.images[::CURVE], self.test.labels[::CURVE], self.test.classes)

        def evaluate(trainer: Trainer) -> dict[str, float]:
            with self.arithmetic():
                right = top1(trainer.model, some, size(trainer), s.device)
            return {"top1": float(right.float().mean()), "size": size(trainer)}

        config = LoopConfig(
            self.out, None, max(1, math.ceil(epochs * len(self.train.labels))),
            schedule=Schedule(warmup=0.2, decay=0.8), clip=5.0, threads=s.threads,
            save_minutes=2.0, eval_minutes=4.0, wall_clock=s.device != "cpu",
        )  # fmt: skip
        trainer = Trainer(
            net, [optimizer], self.batches, lambda t: [(self.batches.next(), s.batch)], loss, config,
            evaluate=evaluate, **more,
        )  # fmt: skip
        if trainer.state_path.is_file():
            trainer.load()
        return trainer.run()


def train_float(settings: Settings, console: Console) -> ResNet50 | None:
    """The float net, trained or loaded; None if interrupted. Test pictures are evaluated in float32."""
    run = Run(settings, "float")
    net = ResNet50(len(run.train.classes)).to(settings.device, memory_format=torch.channels_last)
    done = run.out / "net.pt"
    if done.is_file():
        net.load_state_dict(torch.load(done, weights_only=True))
        return net.eval()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in net.parameters() if p.ndim <= 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor], trainer: Trainer) -> dict[str, Tensor]:
        images, labels = (t.to(settings.device) for t in batch)
        with run.arithmetic():
            answer = module(data.normalize(images, run.size(trainer)))
        return {"loss": F.cross_entropy(answer.float(), labels, label_smoothing=0.1)}

    if not run.loop(net, optimizer, loss, settings.small_epochs + settings.epochs, run.size, console=console):
        return None
    torch.save(net.state_dict(), done)
    torch.save(top1(net, run.test, settings.size, settings.device), run.out / "right.pt")
    return net.eval()


class SparsityHook(BaseHook):
    """Masks 16 x 16 blocks on a cubic schedule over the first half; until then masked blocks may return."""

    def __init__(self, final: float, every: int = 10) -> None:
        self.final, self.every, self.done = final, every, False

    def before_step(self, trainer: Trainer) -> None:
        """Compute new masks."""
        assert isinstance(trainer.model, QuantResNet50)
        share = cubic_sparsity(int(1e6 * trainer.progress), 0, 500_000, self.final)
        last = share == self.final
        if not self.done and (last or trainer.step % self.every == 0):
            trainer.model.prune(share)
            self.done = last

    def after_step(self, trainer: Trainer) -> None:
        """Fields for the step's record."""
        assert isinstance(trainer.model, QuantResNet50)
        trainer.metrics["sparsity"] = trainer.model.pruned()[1].sparsity

    def state_dict(self) -> dict[str, Any]:
        """Whether the masks are final."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.done = state["done"]


def taught(run: Run, teacher: ResNet50) -> Loss:
    """The student's loss: labels, and the teacher's distribution for a share `teach`."""
    settings = run.settings

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor], trainer: Trainer) -> dict[str, Tensor]:
        images, labels = data.normalize(batch[0].to(settings.device), settings.size), batch[1]
        with run.arithmetic():
            answer = module(images).float()
            with torch.no_grad():
                wanted = teacher(images).float().log_softmax(-1)
        hard = F.cross_entropy(answer, labels.to(settings.device))
        soft = F.kl_div(answer.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        return {"loss": (1 - settings.teach) * hard + settings.teach * soft}

    return loss


def train_student(settings: Settings, teacher: ResNet50, console: Console) -> QuantResNet50 | None:
    """The student, trained or loaded; None if interrupted. The CPU kernels evaluate the test pictures."""
    run = Run(settings, "w4a4")
    net = QuantResNet50(teacher.cpu(), settings.size)
    done = run.out / "net.pt"
    if done.is_file():
        net.load_state_dict(torch.load(done, weights_only=True))
        return net.eval()
    compile_rounding()
    teacher = teacher.to(settings.device, memory_format=torch.channels_last).eval()
    net.to(settings.device)
    scales = [p for n, p in net.named_parameters() if n.endswith("log_scale")]
    others = [p for n, p in net.named_parameters() if not n.endswith("log_scale")]
    optimizer = torch.optim.Adam(
        [{"params": others, "lr": settings.student_lr}, {"params": scales, "lr": 5 * settings.student_lr}]
    )

    hooks = [SparsityHook(settings.sparsity)]
    size = settings.size
    if not run.loop(
        net, optimizer, taught(run, teacher), settings.student_epochs, lambda t: size, hooks=hooks,
        console=console,
    ):  # fmt: skip
        return None
    net.cpu().eval()
    torch.save(judge(Engine(net, size, settings.threads), run.test, size), run.out / "right.pt")
    torch.save(net.state_dict(), done)
    return net


def train_control(settings: Settings, teacher: ResNet50, console: Console) -> ResNet50 | None:
    """The float net given the student's epochs, loss and optimizer, trained or loaded; None if interrupted.

    The student's accuracy minus the control's is the effect of 4 bits and zero blocks alone.
    """
    run = Run(settings, "control")
    teacher = teacher.to(settings.device, memory_format=torch.channels_last).eval()
    net, done = copy.deepcopy(teacher), run.out / "net.pt"
    if done.is_file():
        net.load_state_dict(torch.load(done, weights_only=True))
        return net.eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.student_lr)
    size = settings.size
    if not run.loop(
        net, optimizer, taught(run, teacher), settings.student_epochs, lambda t: size, console=console
    ):
        return None
    torch.save(top1(net, run.test, size, settings.device), run.out / "right.pt")
    torch.save(net.state_dict(), done)
    return net.eval()


@torch.no_grad()
def top1(net: nn.Module, pictures: data.Pictures, size: int, device: str, batch: int = 100) -> Tensor:
    """Whether each prediction is correct, bool [N]."""
    net.eval()
    right = []
    for start in range(0, len(pictures.labels), batch):
        part = slice(start, start + batch)
        images = data.normalize(pictures.images[part].to(device), size)
        right.append(net(images).float().argmax(1).cpu() == pictures.labels[part])
    return torch.cat(right)


def judge(engine: Engine, pictures: data.Pictures, size: int) -> Tensor:
    """`top1` with the CPU kernels."""
    right = []
    for image, label in zip(pictures.images, pictures.labels, strict=True):
        right.append(engine(data.normalize(image[None], size)[0]).argmax() == label)
    return torch.stack(right)


@torch.no_grad()
def random_student(size: int, classes: int, sparsity: float) -> tuple[ResNet50, QuantResNet50]:
    """Random nets of the right shapes and sparsity: latency does not depend on the weights' values."""
    torch.manual_seed(0)
    net = ResNet50(classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    net.eval()
    student = QuantResNet50(net, size)
    student.prune(sparsity)
    student(torch.randn(1, 3, size, size))  # initializes the ranges
    assert all(bool(m.started) for m in student.modules() if isinstance(m, Range))
    return net, student.eval()
