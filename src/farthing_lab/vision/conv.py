"""Quantized convolutions on the CPU kernels: a program of layers, run natively at batch 1.

Activations are uint8 with one scale per tensor, weights int8 (or 4-bit integers in int8) with one scale per
output channel; 16 x 16 blocks of zeros in the weights are skipped.

Legend: O outputs, C channels, k kernel, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farthing import _native

CELL = 16
IMAGE_ZERO = 128  # the byte for an image value of 0


@dataclass(frozen=True, slots=True)
class Plane:
    """Location of a tensor [C, H, W]; the border holds the padding value of convolutions."""

    number: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Output:
    """Output formats of a convolution's v = sum * mult + bias (+ residual * residual_scale).

    wide: round(v) in [0, 255]. narrow: (wide + half) >> shift with half = 2^(shift - 1), in [0, top].
    Neither: v itself is the program's result.
    """

    wide: Plane | None = None
    narrow: Plane | None = None
    shift: int = 0
    top: int = 15
    residual: Plane | None = None
    residual_scale: float = 0.0


@dataclass(slots=True)
class ConvProgram:
    """A program of layers in insertion order. Runs one image at a time."""

    threads: int = 1
    isa: str = "auto"
    _net: Any = field(init=False, repr=False)
    _backend: Any = field(init=False, repr=False)
    _image: Plane | None = field(init=False, default=None)
    _result: tuple[int, int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._backend = _native.Backend(self.threads, self.isa)
        self._net = _native.ConvNet(self._backend)

    @property
    def instructions(self) -> str:
        """The kernels' instruction set."""
        return str(self._backend.isa)

    @property
    def multiplications(self) -> int:
        """8-bit multiplications per image, without skipped zero blocks."""
        return sum(self.products())

    def products(self) -> list[int]:
        """The same per step, in insertion order."""
        return list(self._net.products())

    def plane(self, channels: int, height: int, width: int, border: int = 0) -> Plane:
        """Allocate a tensor; tensors with disjoint lifetimes may share memory."""
        groups = -(-channels // CELL)
        return Plane(self._net.plane(groups, height, width, border, CELL, 0), channels, height, width)

    def image(self, height: int, width: int, border: int, scale: float) -> Plane:
        """The input: float32 [3, H, W] becomes round(x / scale) + 128, its border 128."""
        plane = Plane(self._net.plane(1, height, width, border, 4, IMAGE_ZERO), 3, height, width)
        self._net.image(plane.number, 1 / scale)
        self._image = plane
        return plane

    def conv(
        self,
        x: Plane,
        weight: Tensor,
        mult: Tensor,
        bias: Tensor,
        out: Output,
        *,
        stride: int = 1,
        padding: int = 0,
        small_inputs: bool = False,
    ) -> None:
        """weight int8 [O, C, k, k]; mult, bias float32 [O]. small_inputs: x holds at most 15.

        Raises ValueError if shapes do not fit.
        """
        o, c, k, across = weight.shape
        if weight.dtype is not torch.int8 or c != x.channels or k != across:
            raise ValueError(
                f"weight: got {weight.dtype} {tuple(weight.shape)}; expected int8 [O, {x.channels}, k, k]"
            )
        if mult.shape != (o,) or bias.shape != (o,):
            raise ValueError(f"mult {tuple(mult.shape)} and bias {tuple(bias.shape)}; expected [{o}] each")
        packed = weight.permute(0, 2, 3, 1).contiguous()
        mult, bias = mult.float().contiguous(), bias.float().contiguous()
        floats = out.wide is None and out.narrow is None
        self._net.conv(
            input=x.number, kernel=k, stride=stride, padding=padding, outputs=o, channels=c,
            weight=packed.data_ptr(), mult=mult.data_ptr(), bias=bias.data_ptr(), small_inputs=small_inputs,
            residual=_number(out.residual), residual_scale=out.residual_scale,
            wide=_number(out.wide), narrow=_number(out.narrow), shift=out.shift, top=out.top,
            to_floats=floats,
        )  # fmt: skip
        if floats:
            pixels = ((x.height + 2 * padding - k) // stride + 1) * (
                (x.width + 2 * padding - k) // stride + 1
            )
            self._result = (pixels, o)

    def max_pool(self, x: Plane, out: Plane) -> None:
        """3 x 3, stride 2, padding 1."""
        self._net.max_pool(x.number, out.number)

    def mean(self, x: Plane, out: Plane, mult: float) -> None:
        """round(sum over pixels * mult) in [0, 255]."""
        self._net.mean(x.number, out.number, mult)

    def run(self, image: Tensor) -> Tensor:
        """image float32 [3, H, W] -> the result [pixels, O]."""
        image, out = self._buffers(image)
        self._net.run(image.data_ptr(), out.data_ptr())
        assert self._result is not None
        return out[:, : self._result[1]]

    def profile(self, image: Tensor, repeats: int = 20) -> list[float]:
        """Median seconds per step, in insertion order."""
        image, out = self._buffers(image)
        return list(self._net.profile(image.data_ptr(), out.data_ptr(), repeats))

    def _buffers(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self._image is None or self._result is None:
            raise ValueError(
                "the program has no image or no result; expected image() first and one conv() without planes"
            )
        shape = (3, self._image.height, self._image.width)
        if tuple(image.shape) != shape:
            raise ValueError(f"image has shape {tuple(image.shape)}; expected {shape}")
        pixels, outputs = self._result
        return image.float().contiguous(), torch.empty(pixels, -(-outputs // CELL) * CELL)


def _number(plane: Plane | None) -> int:
    return -1 if plane is None else plane.number
