"""The quantized net on the product's own CPU kernels: every convolution a block-sparse INT4 matrix product.

A convolution's input becomes rows (im2col; a 1 x 1 convolution's pixels are rows already), the kernels round
the rows as training did, multiply by the blocks that are left and add bias or shortcut. Pictures lie as
[H W, C].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from bench.resnet50.model import BLOCKS
from bench.resnet50.train import QuantConv2d
from torch import Tensor, nn

from farthing.ops import Ops, select
from farthing.ops.weights import InputRounding, Weight, pack_int4


@dataclasses.dataclass(frozen=True)
class Conv:
    """A packed convolution."""

    handle: Any
    bias: Tensor
    kernel: int
    stride: int
    padding: int


class Engine:
    """Batch 1, [3, H, W] -> logits."""

    def __init__(self, net: nn.Module, threads: int = 1) -> None:
        self.ops: Ops = select("cpu", threads=threads)
        self.convs = {n: self._pack(n, m) for n, m in net.named_modules() if isinstance(m, QuantConv2d)}
        fc = net.get_submodule("fc")
        assert isinstance(fc, nn.Linear)
        self.fc = self.ops.pack_linear("fc", lambda: [Weight("dense", fc.weight.detach())])
        self.fc_bias = fc.bias.detach()[None]

    @torch.no_grad()
    def _pack(self, name: str, m: QuantConv2d) -> Conv:
        keep: Any = m.keep
        q, scale = m.weights.integers((m.weight.flatten(1) * keep)[None])
        if m.first:
            weight = Weight("int8", q[0], scale[0].contiguous())
        else:
            # Never negative, so 15 levels above zero are 4 bits: the largest integer of 5 bits with sign.
            clip = float(m.inputs.log_scale.exp())
            weight = Weight("int4", pack_int4(q[0]), scale[0].contiguous(), inputs=InputRounding(5, clip))
        handle = self.ops.pack_linear(name, lambda: [weight])
        return Conv(handle, m.bias.detach()[None].contiguous(), m.kernel[0], _one(m.stride), _one(m.padding))

    def conv(self, name: str, x: Tensor, side: int, short: Tensor | None = None) -> tuple[Tensor, int]:
        """x [side^2, C] -> (relu(conv(x) + bias + short) [out^2, O], out); no relu for a shortcut's own."""
        c = self.convs[name]
        rows, out = im2col(x, side, c.kernel, c.stride, c.padding)
        if short is not None:
            return self.ops.linear(rows, c.handle, residual=short + c.bias).relu_(), out
        y = self.ops.linear(rows, c.handle, residual=c.bias.expand(len(rows), -1))
        return (y if "downsample" in name else y.relu_()), out

    def __call__(self, image: Tensor) -> Tensor:
        """image [3, S, S] normalized -> logits [classes]."""
        side = image.shape[1]
        x, side = self.conv("conv1", image.permute(1, 2, 0).reshape(side * side, 3), side)
        pooled = F.max_pool2d(x.view(1, side, side, -1).permute(0, 3, 1, 2), 3, 2, 1)
        side = pooled.shape[2]
        x = pooled.permute(0, 2, 3, 1).reshape(side * side, -1)
        for i, count in enumerate(BLOCKS):
            for j in range(count):
                x, side = self._block(f"layer{i + 1}.{j}", x, side)
        logits: Tensor = self.ops.linear(x.mean(0, keepdim=True), self.fc, residual=self.fc_bias.clone())[0]
        return logits

    def _block(self, name: str, x: Tensor, side: int) -> tuple[Tensor, int]:
        y, _ = self.conv(f"{name}.conv1", x, side)
        y, out = self.conv(f"{name}.conv2", y, side)
        short = x
        if f"{name}.downsample.0" in self.convs:
            short, _ = self.conv(f"{name}.downsample.0", x, side)
        return self.conv(f"{name}.conv3", y, out, short)


def im2col(x: Tensor, side: int, kernel: int, stride: int, padding: int) -> tuple[Tensor, int]:
    """x [side^2, C] -> (rows [out^2, kernel^2 C], out); the channels of a pixel stand together."""
    channels = x.shape[1]
    if kernel == 1 and stride == 1:
        return x, side
    grid = x.view(side, side, channels)
    if padding:
        grid = F.pad(grid, (0, 0, padding, padding, padding, padding))
    out = (side + 2 * padding - kernel) // stride + 1
    across, down, _ = grid.stride()
    windows = grid.as_strided(
        (out, out, kernel, kernel, channels), (stride * across, stride * down, across, down, 1)
    )
    return windows.reshape(out * out, kernel * kernel * channels), out


def _one(value: Any) -> int:
    return int(value[0]) if isinstance(value, tuple) else int(value)
