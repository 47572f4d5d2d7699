"""The native convolutions of every instruction set, bitwise equal to integer arithmetic in torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing_lab.vision import IMAGE_ZERO, ConvProgram, Output, Plane
from tests.isas import ISAS

pytestmark = pytest.mark.pairs


@pytest.fixture(params=[(isa, threads) for isa in ISAS for threads in (1, 2)], ids=str)
def program(request: pytest.FixtureRequest) -> ConvProgram:
    torch.manual_seed(0)
    isa, threads = request.param
    return ConvProgram(threads, isa)


@dataclass(frozen=True)
class Layer:
    """An integer convolution and its fused steps."""

    weight: Tensor
    mult: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, scale: float = 0.0, zero: int = 0
    ) -> Tensor:
        """x [C, H, W] of integers -> v [O, H', W'], float32 after every fused step."""
        x = F.pad(x.double(), (self.padding,) * 4, value=zero)
        sums = F.conv2d(x[None], self.weight.double(), stride=self.stride)[0]
        v = fused(sums, self.mult[:, None, None], self.bias[:, None, None])
        return v if residual is None else fused(residual.double(), torch.tensor(scale), v)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 values, rounded once to float32 (the product is exact in float64)."""
    return (a.double() * b.double() + c.double()).float()


def wide(v: Tensor) -> Tensor:
    return v.round().clamp(0, 255)


def narrow(v: Tensor, shift: int, top: int) -> Tensor:
    return ((wide(v) + (1 << shift >> 1)).clamp(max=255).int() >> shift).clamp(max=top).double()


def random_weight(outputs: int, channels: int, kernel: int, top: int, sparsity: float = 0.4) -> Tensor:
    """Integers up to `top`; a share of the 16 x 16 blocks is zero."""
    w = torch.randint(-top, top + 1, (outputs, channels, kernel, kernel), dtype=torch.int8)
    keep = torch.rand(-(-outputs // 16), -(-channels // 16), kernel, kernel) >= sparsity
    keep = keep.repeat_interleave(16, 0)[:outputs].repeat_interleave(16, 1)[:, :channels]
    return w * keep


def random_layer(
    outputs: int, channels: int, kernel: int, stride: int = 1, top: int = 7, level: float = 15.0
) -> Layer:
    spread = level * top * (channels * kernel * kernel) ** 0.5
    weight = random_weight(outputs, channels, kernel, top)
    return Layer(weight, torch.rand(outputs) * 40 / spread, torch.randn(outputs) * 9 + 4, stride, kernel // 2)


def first(
    program: ConvProgram, height: int, width: int, channels: int, small: bool
) -> tuple[Tensor, Tensor, Plane]:
    """(picture, its first layer's integers [C, H / 2, W / 2], their plane): the start of every test."""
    picture = torch.randn(3, height, width)
    scale = 0.03
    x = program.image(height, width, 3, scale)
    layer = random_layer(channels, 3, 7, 2, 127, 127.0)
    layer = Layer(layer.weight, layer.mult, layer.bias, 2, 3)
    pixels = (
        fused(picture, torch.tensor(1 / scale).float(), torch.tensor(float(IMAGE_ZERO))).round().clamp(0, 255)
    )
    v = layer(pixels, zero=IMAGE_ZERO)
    out = program.plane(channels, v.shape[1], v.shape[2], 1)
    top, shift = (15, 2) if small else (255, 0)
    program.conv(
        x, layer.weight, layer.mult, layer.bias, Output(narrow=out, shift=shift, top=top), stride=2, padding=3
    )
    return picture, narrow(v, shift, top), out


def finish(program: ConvProgram, x: Tensor, plane: Plane, small: bool, picture: Tensor) -> None:
    """Check every byte of `plane` against x [C, H, W], by a final 1 x 1 convolution to floats."""
    channels = x.shape[0]
    eye = torch.eye(channels, dtype=torch.int8)[:, :, None, None]
    one, none = torch.ones(channels), torch.zeros(channels)
    program.conv(plane, eye, one, none, Output(), small_inputs=small)
    result = program.run(picture)
    assert x.max() > x.min()
    assert torch.equal(result.t().reshape(x.shape).double(), x.double())


@pytest.mark.parametrize(("height", "width"), [(28, 28), (33, 17), (7, 64)])
@pytest.mark.parametrize("channels", [16, 40])
def test_image_and_first_convolution(program: ConvProgram, height: int, width: int, channels: int) -> None:
    picture, x, plane = first(program, height, width, channels, small=False)
    finish(program, x, plane, False, picture)


@pytest.mark.parametrize("small", [True, False], ids=["u4", "u8"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize(("channels", "outputs"), [(16, 16), (48, 64), (20, 33)])
def test_convolutions(
    program: ConvProgram, small: bool, kernel: int, stride: int, channels: int, outputs: int
) -> None:
    picture, x, plane = first(program, 34, 29, channels, small)
    layer = random_layer(outputs, channels, kernel, stride)
    v = layer(x)
    out = program.plane(outputs, v.shape[1], v.shape[2])
    program.conv(
        plane,
        layer.weight,
        layer.mult,
        layer.bias,
        Output(narrow=out),
        stride=stride,
        padding=kernel // 2,
        small_inputs=small,
    )
    finish(program, narrow(v, 0, 15), out, True, picture)


@pytest.mark.parametrize("shift", [0, 1, 3, 4])
@pytest.mark.parametrize("show", ["wide", "narrow"])
def test_residual_with_both_outputs_in_place(program: ConvProgram, shift: int, show: str) -> None:
    picture, x, plane = first(program, 31, 30, 32, small=True)
    shortcut, layer = random_layer(48, 32, 1), random_layer(48, 32, 3)
    s = wide(shortcut(x))
    kept, narrowed = program.plane(48, 16, 15, 1), program.plane(48, 16, 15)
    program.conv(plane, shortcut.weight, shortcut.mult, shortcut.bias, Output(wide=kept), small_inputs=True)
    program.conv(
        plane, layer.weight, layer.mult, layer.bias,
        Output(wide=kept, narrow=narrowed, shift=shift, residual=kept, residual_scale=0.7),
        padding=1, small_inputs=True,
    )  # fmt: skip
    v = layer(x, s, 0.7)
    if show == "wide":
        finish(program, wide(v), kept, False, picture)
    else:
        finish(program, narrow(v, shift, 15), narrowed, True, picture)


def test_max_pool_and_mean(program: ConvProgram) -> None:
    picture, x, plane = first(program, 37, 30, 48, small=False)
    pooled = F.max_pool2d(x[None], 3, 2, 1)[0]
    out, mean = program.plane(48, *pooled.shape[1:]), program.plane(48, 1, 1)
    program.max_pool(plane, out)
    mult = torch.tensor(0.9 / pooled[0].numel())
    program.mean(out, mean, float(mult))
    expected = (pooled.sum((1, 2)).float() * mult).round().clamp(max=255)
    finish(program, expected[:, None, None], mean, False, picture)


def test_threads_without_a_core_of_their_own_change_nothing() -> None:
    pictures = torch.randn(20, 3, 34, 29)
    results = []
    for threads in (1, 5):
        torch.manual_seed(0)
        program = ConvProgram(threads, ISAS[-1])
        _, x, plane = first(program, 34, 29, 48, True)
        for _ in range(6):
            layer = random_layer(48, 48, 3)
            x = narrow(layer(x), 0, 15)
            out = program.plane(48, x.shape[1], x.shape[2], 1)
            program.conv(
                plane, layer.weight, layer.mult, layer.bias, Output(narrow=out), padding=1, small_inputs=True
            )
            plane = out
        eye = torch.eye(48, dtype=torch.int8)[:, :, None, None]
        program.conv(plane, eye, torch.ones(48), torch.zeros(48), Output(), small_inputs=True)
        results.append(torch.stack([program.run(picture) for picture in pictures]))
    assert results[0].max() > results[0].min()
    assert torch.equal(results[0], results[1])


def test_zero_blocks_are_skipped(program: ConvProgram) -> None:
    x = program.plane(64, 9, 9, 1)
    weight = torch.ones(64, 64, 3, 3, dtype=torch.int8)
    weight[16:32, :, 1, 1] = 0
    weight[:, 32:48, 0, 2] = 0
    before = program.multiplications
    program.conv(
        x, weight, torch.ones(64), torch.zeros(64), Output(narrow=program.plane(64, 9, 9)), padding=1
    )
    assert program.multiplications - before == 81 * 256 * (16 * 9 - 4 - 4)


def test_unsupported_shapes_are_rejected(program: ConvProgram) -> None:
    x, one = program.plane(32, 8, 8), torch.ones(16)
    weight = torch.ones(16, 32, 3, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="border"):
        program.conv(x, weight, one, one, Output(narrow=program.plane(16, 8, 8)), padding=1)
    with pytest.raises(ValueError, match="another shape"):
        program.conv(x, weight, one, one, Output(narrow=program.plane(16, 8, 8)))
    with pytest.raises(ValueError, match=r"expected int8 \[O, 32, k, k\]"):
        program.conv(x, weight[:, :16], one, one, Output())
    with pytest.raises(ValueError, match="no image"):
        program.run(torch.zeros(3, 8, 8))
