"""Row kernels: norm, fused norm and quantization, softmax; and their rounding."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import Norm
from farthing.ops.reference import ReferenceOps
from farthing_gpu import GpuOps
from farthing_gpu.launch import narrow
from farthing_gpu.sample import quantize, rms_norm, softmax
from tests.gpu.parts import DEVICE, EPS, norm

REF = ReferenceOps(torch.float32)


@triton.jit
def _narrow(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, narrow(tl.load(x + i), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_rounding_equals_torch(dtype: torch.dtype) -> None:
    random = torch.randn(900) * torch.logspace(-4, 2.5, 900)
    ties = torch.arange(0, 60).float() * 0.5**10  # halves of the smallest steps of FP8
    edges = torch.tensor([0.0, -0.0, 448.0, -448.0, 2.0**-6, 0.9999 * 2.0**-6, 240.0, 447.9, 1.0625, 1.1875])
    x = torch.cat((random.clamp(-448, 448), ties, -ties[:54], edges))
    assert len(x) == 1024
    out = torch.empty(1024, dtype=dtype, device=DEVICE)
    _narrow[(1,)](x.to(DEVICE), out, 1024)
    assert torch.equal(out.cpu().view(torch.uint8), x.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("n", [1, 15, 128, 300])
def test_softmax_and_norm(n: int) -> None:
    x = torch.randn(3, n) * 8
    wide = torch.randn(3, n + 5)[:, 5:]
    for held in (16384, 64):  # in one block, and streamed
        torch.testing.assert_close(softmax(x.to(DEVICE), held).cpu(), x.softmax(-1), atol=1e-6, rtol=1e-5)
    w = norm(n)
    y = rms_norm(wide.to(DEVICE), Norm(w.to(DEVICE), EPS)).cpu()
    torch.testing.assert_close(y, REF.rms_norm(wide, Norm(w, EPS)), atol=1e-5, rtol=1e-5)


def test_softmax_of_partly_masked_rows() -> None:
    x = torch.randn(2, 200)
    x[0, :150] = float("-inf")
    for held in (16384, 64):
        torch.testing.assert_close(softmax(x.to(DEVICE), held).cpu(), x.softmax(-1), atol=1e-6, rtol=1e-5)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 with one scale per row and 128 columns, in torch."""
    k = x.shape[1]
    groups = torch.nn.functional.pad(x, (0, -k % 128)).unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1).clamp_min(1e-4) / 448
    q = (groups / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.flatten(1)[:, :k], scale


@pytest.mark.parametrize("k", [16, 128, 130, 700])
@pytest.mark.parametrize("normed", [False, True])
def test_quantize(k: int, normed: bool) -> None:
    x, w = torch.randn(4, k) * torch.tensor([[1e-6], [1.0], [30.0], [1e4]]), norm(k)
    q, scale = quantize(x.to(DEVICE), Norm(w.to(DEVICE), EPS) if normed else None)
    wanted, expected = rounded(REF.rms_norm(x, Norm(w, EPS)) if normed else x)
    torch.testing.assert_close(scale.cpu(), expected, rtol=1e-5, atol=0)
    same = q.cpu().view(torch.uint8) == wanted.view(torch.uint8)
    assert same.float().mean() > (0.98 if normed else 0.999)  # the norm's sum may round differently
    torch.testing.assert_close(q.cpu().float(), wanted.float(), rtol=0.13, atol=2.0**-8)


def test_no_rows() -> None:
    ops = GpuOps(torch.float32, DEVICE)
    x = torch.empty(0, 32, device=DEVICE)
    assert ops.rms_norm(x, Norm(torch.ones(32), EPS)).shape == (0, 32)
    assert softmax(x).shape == (0, 32)
    table = torch.randn(5, 32).bfloat16()
    ids = torch.tensor([4, 0], device=DEVICE)
    assert torch.equal(ops.embed(ids, table).cpu(), REF.embed(ids.cpu(), table))
