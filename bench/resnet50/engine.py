"""The student on Farthing's own CPU kernels, one picture at a time: see `farthing_lab.vision`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bench.resnet50.quantize import IMAGE_SCALE, SHIFT, QuantBottleneck, QuantConv, QuantResNet50, Range
from torch import Tensor

from farthing_lab.vision import IMAGE_ZERO, ConvProgram, Output, Plane


@dataclass(frozen=True)
class Scaled:
    """A tensor of integers q with values (q - zero) * scale."""

    plane: Plane
    scale: Tensor
    zero: int = 0


class Engine:
    """Batch 1: a normalized picture [3, S, S] -> logits [classes]."""

    @torch.no_grad()
    def __init__(self, net: QuantResNet50, size: int, threads: int = 1, isa: str = "auto") -> None:
        self.program = ConvProgram(threads, isa)
        self.names = ["image"]
        image = Scaled(self.program.image(size, size, 3, IMAGE_SCALE), torch.tensor(IMAGE_SCALE), IMAGE_ZERO)
        size = (size + 1) // 2
        first = Scaled(self.program.plane(64, size, size, 1), _step(net.range1))
        self._conv("conv1", net.conv1, image, first.scale, Output(narrow=first.plane), small=False)
        size = (size + 1) // 2
        x = Scaled(self.program.plane(64, size, size), first.scale)
        self.program.max_pool(first.plane, x.plane)
        self.names.append("max_pool")
        wide = x
        for i, block in enumerate(net.blocks):
            assert isinstance(block, QuantBottleneck)
            x, wide = self._block(f"block{i}", block, x, wide)
        mean = self.program.plane(wide.plane.channels, 1, 1)
        step = _step(net.mean_range)
        pixels = wide.plane.height * wide.plane.width
        self.program.mean(wide.plane, mean, float(wide.scale / step / pixels))
        self.names.append("mean")
        self._conv("fc", net.fc, Scaled(mean, step), torch.tensor(1.0), Output(), small=False)

    def __call__(self, image: Tensor) -> Tensor:
        """image [3, S, S] normalized -> logits [classes]."""
        return self.program.run(image)[0]

    def _block(self, name: str, b: QuantBottleneck, x: Scaled, wide: Scaled) -> tuple[Scaled, Scaled]:
        size, width, outputs = x.plane.height, len(b.conv1.bias), len(b.conv3.bias)
        small = (size - 1) // b.conv2.stride + 1
        inner = Scaled(self.program.plane(width, size, size, 1), _step(b.range1))
        self._conv(f"{name}.conv1", b.conv1, x, inner.scale, Output(narrow=inner.plane))
        outer = Scaled(self.program.plane(width, small, small), _step(b.range2))
        self._conv(f"{name}.conv2", b.conv2, inner, outer.scale, Output(narrow=outer.plane))
        step = _step(b.out)
        narrow = x.plane
        if b.down is not None:
            assert b.down_range is not None
            wide = Scaled(self.program.plane(outputs, small, small), _step(b.down_range), IMAGE_ZERO)
            self._conv(f"{name}.down", b.down, x, wide.scale, Output(wide=wide.plane), zero=IMAGE_ZERO)
            narrow = self.program.plane(outputs, small, small)
        # In place: every sum is read before it is overwritten, and the 4-bit input is no longer needed.
        scale = step / (1 << SHIFT)
        out = Output(wide.plane, narrow, SHIFT, 15, wide.plane, float(wide.scale / scale))
        self._conv(f"{name}.conv3", b.conv3, outer, scale, out, offset=-wide.zero * wide.scale / scale)
        return Scaled(narrow, step), Scaled(wide.plane, scale)

    def _conv(
        self,
        name: str,
        conv: QuantConv,
        x: Scaled,
        scale: Tensor,
        out: Output,
        zero: int = 0,
        offset: Tensor | float = 0.0,
        small: bool = True,
    ) -> None:
        """Output integers have the values (q - zero) * scale; `offset` integers are added."""
        q, weight_scale = conv.integers()
        mult = weight_scale * x.scale / scale
        bias = conv.bias / scale + zero + offset - x.zero * q.sum((1, 2, 3)) * mult
        self.program.conv(
            x.plane, q, mult, bias, out, stride=conv.stride, padding=conv.padding, small_inputs=small
        )
        self.names.append(name)


def _step(r: Range) -> Tensor:
    return r.log_scale.exp()
