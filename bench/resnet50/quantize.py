"""The student: ResNet-50 on the integer grids of `farthing_lab.vision`, trained with LSQ.

Every convolution reads 4-bit inputs (0 … 15, one learned scale per tensor) and has 4-bit weights (one learned
scale per output channel). Two layers have 8-bit inputs and weights: the first, which reads the picture, and
the classifier. Sums along the shortcuts are kept in 8 bits, with eight steps per step of the 4-bit copy that
the next convolution reads.

Shapes: B pictures, C channels, O outputs, k kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from bench.resnet50.data import MEAN, STD
from bench.resnet50.model import BLOCKS, Bottleneck
from torch import Tensor, nn

from farthing_lab.compress.masks import mask
from farthing_lab.train.lsq import fake_quantize
from farthing_lab.vision.module import fold_batch_norms

SHIFT = 3  # a step of 4 bits is 2^3 steps of 8 bits
SAMPLE = 1 << 16
IMAGE_SCALE = max(max(m, 1 - m) / s for m, s in zip(MEAN, STD, strict=True)) / 127


class Range(nn.Module):
    """A learned step between integers, initialized to the least squared error on the first batch."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("started", torch.tensor(False))

    def scale(self) -> Tensor:
        """The step, [1, 1, 1, 1]."""
        return self.log_scale.exp().view(1, 1, 1, 1)

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        """Set the step from x, once."""
        started: Any = self.started
        if started:
            return
        sample = x.float().flatten()
        sample = sample[:: max(1, len(sample) // SAMPLE)].clamp(min=0.0 if self.low == 0 else -torch.inf)
        full = sample.abs().max().clamp_min(1e-6) / self.high
        trials = [full * i / 20 for i in range(2, 21)]
        errors = [
            ((sample / s).round().clamp(self.low, self.high) * s - sample).square().mean() for s in trials
        ]
        self.log_scale.copy_(trials[int(torch.stack(errors).argmin())].log())
        started.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Round x to the grid; an unsigned range also acts as a ReLU."""
        self.begin(x)
        # bfloat16, which the next product reads, represents sixteen steps exactly; sums need more.
        dtype = x.dtype if self.high <= 15 else torch.float32
        return fake_quantize(x, self.scale(), self.low, self.high, dtype=dtype)


class QuantConv(nn.Module):
    """Weights of 4 or 8 bits, some 16 x 16 blocks of them zero, and a bias."""

    def __init__(self, weight: Tensor, bias: Tensor, bits: int, stride: int, padding: int) -> None:
        super().__init__()
        self.stride, self.padding, self.high = stride, padding, (1 << bits - 1) - 1
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        full = weight.detach().abs().amax((1, 2, 3)).clamp_min(1e-8) / self.high
        best, least = full, torch.full_like(full, torch.inf)
        for factor in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5) if bits == 4 else (1.0,):
            s = (full * factor)[:, None, None, None]
            rounded = (weight.detach() / s).round().clamp(-self.high, self.high) * s
            error = (rounded - weight.detach()).square().sum((1, 2, 3))
            best, least = torch.where(error < least, full * factor, best), torch.minimum(error, least)
        self.log_scale = nn.Parameter(best.log())
        self.register_buffer("keep", torch.ones_like(weight, dtype=torch.bool))

    def prune(self, share: float) -> None:
        """Mask the `share` of blocks (16 outputs, 16 channels of a tap) with the least energy."""
        o, c, k, _ = self.weight.shape
        energy = self.weight.detach().square().permute(0, 2, 3, 1).flatten(1)
        self.keep = mask(energy, share, "16x16").view(o, k, k, c).permute(0, 3, 1, 2).contiguous()

    @property
    def sparsity(self) -> float:
        """Share of masked weights."""
        keep: Any = self.keep
        return 1 - float(keep.float().mean())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        keep: Any = self.keep
        scale = self.log_scale.exp().view(-1, 1, 1, 1)
        weight = fake_quantize(self.weight * keep, scale, -self.high, self.high)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    @torch.no_grad()
    def integers(self) -> tuple[Tensor, Tensor]:
        """(int8 [O, C, k, k], scale [O])."""
        keep: Any = self.keep
        scale = self.log_scale.exp()
        q = (self.weight * keep / scale.view(-1, 1, 1, 1)).round().clamp(-self.high, self.high)
        return q.to(torch.int8), scale


def _conv(conv: nn.Module, bits: int = 4) -> QuantConv:
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    return QuantConv(conv.weight, conv.bias, bits, conv.stride[0], int(conv.padding[0]))


class QuantBottleneck(nn.Module):
    """The bottleneck block on integers."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (_conv(c) for c in (block.conv1, block.conv2, block.conv3))
        self.range1, self.range2, self.out = (Range(0, 15) for _ in range(3))
        self.down = None if block.downsample is None else _conv(block.downsample[0])
        self.down_range = None if self.down is None else Range(-128, 127)

    def forward(self, x: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        """(4-bit input, 8-bit input) -> (4-bit output, 8-bit output)."""
        if self.down is not None:
            assert self.down_range is not None
            wide = self.down_range(self.down(x))
        y = self.range2(self.conv2(self.range1(self.conv1(x))))
        v = self.conv3(y) + wide
        self.out.begin(v)
        step = self.out.scale()
        wide = fake_quantize(v, step / (1 << SHIFT), 0, 255)
        # Halves round up, as an integer shift does; the added value is less than one 8-bit step.
        x = fake_quantize(wide + step.detach() / (4 << SHIFT), step, 0, 15, dtype=x.dtype)
        return x, wide


class QuantResNet50(nn.Module):
    """The quantized student of a float ResNet-50."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        net = fold_batch_norms(net, torch.zeros(1, 3, size, size))
        self.conv1 = _conv(net.get_submodule("conv1"), bits=8)
        self.range1 = Range(0, 15)
        self.blocks = nn.ModuleList()
        for i, count in enumerate(BLOCKS):
            for j in range(count):
                block = net.get_submodule(f"layer{i + 1}.{j}")
                assert isinstance(block, Bottleneck)
                self.blocks.append(QuantBottleneck(block))
        self.mean_range = Range(0, 255)
        fc = net.get_submodule("fc")
        assert isinstance(fc, nn.Linear)
        self.fc = QuantConv(fc.weight[:, :, None, None], fc.bias, 8, 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized pictures [B, 3, H, W] -> logits [B, classes]."""
        x = (x / IMAGE_SCALE).round().clamp(-128, 127) * IMAGE_SCALE
        x = F.max_pool2d(self.range1(self.conv1(x)), 3, 2, 1)
        wide = x
        for block in self.blocks:
            x, wide = block(x, wide)
        mean = self.mean_range(wide.mean((2, 3), keepdim=True))
        return self.fc(mean).flatten(1)  # type: ignore[no-any-return]

    def pruned(self) -> list[QuantConv]:
        """The prunable convolutions: all but the first, without the classifier."""
        return [m for block in self.blocks for m in block.modules() if isinstance(m, QuantConv)]

    def prune(self, share: float) -> None:
        """Mask the same share of blocks in each of them."""
        for conv in self.pruned():
            conv.prune(share)
