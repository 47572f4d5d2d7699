"""2:4 and 16 x 16 block-sparse products compared with the equivalent dense products."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from farthing.ops.api import Norm
from farthing.ops.reference import ReferenceOps
from farthing.ops.weights import Weight, quantize_int8
from farthing_gpu import GpuOps
from farthing_gpu.sparse import Blocks, TwoOfFour, find, multiply, pack_blocks
from tests.gpu.parts import DEVICE, EPS, norm
from tests.ops.parts import distance


def cut(n: int, k: int, two_of_four: bool, int8: bool) -> Weight:
    """A random matrix with the requested zero pattern."""
    w = torch.randn(n, k)
    if two_of_four:
        groups = w.view(n, k // 4, 4)
        groups.scatter_(-1, groups.abs().topk(2, dim=-1, largest=False).indices, 0.0)
        groups[0, 0] = 0  # a group of zeros, and one with a single nonzero
        groups[1, 0, 1:] = 0
    else:
        kept = torch.rand(n // 16, k // 16) < 0.3
        kept[0] = False  # an empty panel
        w *= kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return quantize_int8(w) if int8 else Weight("dense", w)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("two_of_four", [True, False])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 48, 64), (5, 32, 208), (33, 64, 96)])
def test_products(two_of_four: bool, int8: bool, tokens: int, n: int, k: int) -> None:
    w, x, residual = cut(n, k, two_of_four, int8), torch.randn(tokens, k), torch.randn(tokens, n)
    sparse = find(w, torch.float32, DEVICE)
    assert isinstance(sparse, TwoOfFour if two_of_four else Blocks)
    out = torch.empty(tokens, n, device=DEVICE)
    multiply(x.to(DEVICE), sparse, out, residual.to(DEVICE))
    assert distance(out.cpu(), residual + x @ w.dequantize().t()) < 1e-10


@pytest.mark.parametrize("two_of_four", [True, False])
def test_int8_of_bfloat16_activations(two_of_four: bool) -> None:
    w, x = cut(32, 64, two_of_four, True), torch.randn(5, 64).bfloat16()
    sparse = find(w, torch.bfloat16, DEVICE)
    assert sparse is not None
    out = torch.empty(5, 32, device=DEVICE)
    multiply(x.to(DEVICE), sparse, out)
    assert distance(out.cpu(), x.float() @ w.dequantize().t()) < 1e-9


def test_sparse_formats_save_bytes() -> None:
    two = find(cut(64, 256, True, False), torch.bfloat16, DEVICE)
    assert isinstance(two, TwoOfFour)
    assert two.values.nbytes + two.places.nbytes == 64 * 256 * 2 * 5 // 8
    one = torch.zeros(32, 256)
    one[20, 100] = 1
    blocks = find(Weight("dense", one), torch.bfloat16, DEVICE)
    assert isinstance(blocks, Blocks) and blocks.starts.tolist() == [0, 0, 4]


def test_weights_without_a_pattern_stay_dense() -> None:
    assert find(Weight("dense", torch.randn(32, 64)), torch.float32, DEVICE) is None
    assert pack_blocks(torch.zeros(16, 16), torch.zeros(1, 1, dtype=torch.bool), None).starts.tolist() == [
        0,
        0,
    ]


def test_projections_detect_the_pattern() -> None:
    ops, ref = GpuOps(torch.float32, DEVICE), ReferenceOps(torch.float32)
    stack = [cut(32, 64, True, False), Weight("dense", torch.randn(20, 64)), cut(48, 64, False, False)]
    x, scale = torch.randn(3, 64), norm(64)
    y = ops.linear(x.to(DEVICE), ops.pack_linear("w", lambda: stack), Norm(scale, EPS))
    assert distance(y.cpu(), ref.linear(x, ref.pack_linear("w", lambda: stack), Norm(scale, EPS))) < 1e-10
