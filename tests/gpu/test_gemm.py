"""Dense products of every format against the reference, and FP8 against its own rounded inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from farthing.ops.api import Norm
from farthing.ops.reference import ReferenceOps
from farthing.ops.weights import Weight
from farthing_gpu.gemm import gemm, linear, narrowed
from farthing_gpu.launch import Config
from farthing_gpu.matrix import pack, pair, stack_rows
from farthing_gpu.sample import quantize
from tests.gpu.parts import BOUNDS, DEVICE, EPS, FORMATS, norm, on_device
from tests.ops.parts import SCALED, UNITS, distance, weight

REF = ReferenceOps(torch.float32)
ROUNDED = 1e-5  # results in bfloat16: half the square of 2^-9


@pytest.mark.parametrize(
    ("name", "tokens", "n", "k"),
    [
        *((name, 17, 33, 192) for name in FORMATS),
        *(
            pytest.param(name, *sizes, marks=() if name in ("bf16", "int4_zero") else pytest.mark.slow)
            for name in FORMATS
            for sizes in ((1, 48, 64), (40, 150, 288))
        ),
    ],
)
def test_linear(name: str, tokens: int, n: int, k: int) -> None:
    w, x, scale, residual = weight(name, n, k), torch.randn(tokens, k), norm(k), torch.randn(tokens, n)
    parts = [pack(w, torch.float32, DEVICE)]
    y = linear(x.to(DEVICE), parts, Norm(scale.to(DEVICE), EPS), residual.to(DEVICE), torch.float32)
    expected = REF.linear(x, REF.pack_linear("w", lambda: [w]), Norm(scale, EPS), residual)
    assert distance(y.cpu(), expected) < BOUNDS[name]


@pytest.mark.parametrize("group", [16, 32, 48, 64, 128])
def test_int4_groups(group: int) -> None:
    w, x = weight("int4_zero", 40, 3 * group, group), torch.randn(5, 3 * group)
    y = linear(x.to(DEVICE), [pack(w, torch.float32, DEVICE)], None, None, torch.float32)
    assert distance(y.cpu(), x @ w.dequantize().t()) < BOUNDS["int4"]


@pytest.mark.parametrize("name", [*UNITS, *SCALED, "q5_1"])
def test_formats_that_take_the_place_of_another(name: str) -> None:
    w, x = weight(name, 40, 512), torch.randn(5, 512)
    y = linear(x.to(DEVICE), [pack(w, torch.float32, DEVICE)], None, None, torch.float32)
    assert distance(y.cpu(), x @ w.dequantize().t()) < BOUNDS[name]


def test_int4_groups_that_fit_no_tile_are_rejected() -> None:
    with pytest.raises(ValueError, match="group size: got 8; expected a multiple of 16"):
        pack(weight("int4", 16, 32, 8), torch.float32, DEVICE)


@pytest.mark.parametrize("rows", [(24, 40), (128, 40), (130, 7)])
@pytest.mark.parametrize("name", ["f32", "int8", "int4", "fp8"])
def test_stacked_matrices_and_strided_rows(name: str, rows: tuple[int, int]) -> None:
    stack = [weight(name, n, 64) for n in rows]
    x = torch.randn(4, 200).to(DEVICE)[:, 60:124]
    parts = stack_rows([pack(w, torch.float32, DEVICE) for w in stack])
    assert len(parts) == (2 if name == "fp8" and rows[0] != 128 else 1)
    y = linear(x, parts, None, None, torch.float32)
    value = torch.cat([w.dequantize() for w in stack])
    assert distance(y.cpu(), x.cpu() @ value.t()) < BOUNDS[name]


@pytest.mark.parametrize(
    ("rows", "columns", "bn"),
    [(8, 7168, 32), (8, 2112, 16), (8, 512, 16), (512, 2112, 128), (512, 1024, 64)],
)
def test_tiles_are_narrow_enough_to_use_most_multiprocessors(rows: int, columns: int, bn: int) -> None:
    tile = Config(bm=16, bn=32) if rows == 8 else Config(bm=64, bn=128)
    assert narrowed(tile, rows, columns, 132) == replace(tile, bn=bn)


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    """FP8 [T, K] with one scale per row and 128 columns, dequantized."""
    return q.float() * scale.repeat_interleave(128, 1)[:, : q.shape[1]]


@pytest.mark.parametrize("k", [128, 96, 300])
@pytest.mark.parametrize(("bn", "n"), [(32, 200), (128, 200), (256, 100), (256, 200), (256, 384), (256, 520)])
def test_fp8_product_is_exact_on_rounded_inputs(k: int, bn: int, n: int) -> None:
    w, x = weight("fp8", n, k), torch.randn(7, k) * torch.logspace(-3, 3, 7)[:, None]
    q, scale = quantize(x.to(DEVICE))
    out = torch.empty(7, n, device=DEVICE)
    gemm(q, pack(w, torch.float32, DEVICE), out, scale, choice=Config(bm=16, bn=bn, bk=128))
    assert distance(out.cpu(), dequantized(q, scale).cpu() @ w.dequantize().t()) < 1e-9


@pytest.mark.parametrize("name", ["f32", "int8", "int4_zero"])
def test_a_pair_alternates(name: str) -> None:
    gate, up = weight(name, 24, 64), weight(name, 24, 64)
    x = torch.randn(3, 64)
    both = pair(pack(gate, torch.float32, DEVICE), pack(up, torch.float32, DEVICE))
    y = linear(x.to(DEVICE), [both], None, None, torch.float32).cpu()
    assert distance(y[:, 0::2], x @ gate.dequantize().t()) < BOUNDS[name]
    assert distance(y[:, 1::2], x @ up.dequantize().t()) < BOUNDS[name]


def test_fp8_pair_is_concatenated() -> None:
    gate, up = weight("fp8", 128, 64), weight("fp8", 128, 64)
    x = torch.randn(3, 64)
    both = pair(pack(gate, torch.float32, DEVICE), pack(up, torch.float32, DEVICE))
    y = linear(x.to(DEVICE), [both], None, None, torch.float32).cpu()
    value = torch.cat((gate.dequantize(), up.dequantize()))
    assert distance(y, x @ value.t()) < BOUNDS["fp8"]


@pytest.mark.parametrize("name", ["bf16", "int8", "int4_zero"])
def test_bfloat16(name: str) -> None:
    dtype = torch.bfloat16
    w, x = weight(name, 70, 96), torch.randn(20, 96).to(dtype)
    y = linear(x.to(DEVICE), [pack(w, dtype, DEVICE)], None, None, dtype)
    assert y.dtype is dtype
    assert distance(y.cpu(), x.float() @ w.dequantize().t()) < ROUNDED


def test_device_without_fp8_keeps_the_value() -> None:
    w = weight("fp8", 40, 200)
    m = pack(w, torch.float32, DEVICE, fp8=False)
    assert m.format == "dense"
    assert torch.equal(on_device(w.dequantize()), m.data[0])


def test_weights_of_two_formats_are_not_paired() -> None:
    with pytest.raises(ValueError, match="gate is dense 16 x 32 and up int8 16 x 32; expected one format"):
        pair(
            pack(Weight("dense", torch.ones(16, 32)), torch.float32, DEVICE),
            pack(weight("int8", 16, 32), torch.float32, DEVICE),
        )
