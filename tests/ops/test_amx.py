"""What AMX tiles promise: integers give the bits of the AVX-512 kernels, for any number of rows.

`make test-isa` emulates tiles on processors without them. `test_batch_invariance.py` covers bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import pack, plan
from farthing.ops.cpu.weights import Linear
from farthing.ops.weights import InputRounding, Weight
from tests.ops.parts import EPS, ROUTERS, experts, norm, weight

SETS = _native.instruction_sets().split()
pytestmark = pytest.mark.skipif(
    not {"amx", "avx512_vnni"} <= set(SETS), reason="needs AMX and AVX-512; make test-isa emulates the former"
)

INTEGERS = ["int8", "int4", "int4_zero", "nl4"]
ROWS = 100


@pytest.fixture
def both() -> tuple[CpuOps, CpuOps]:
    torch.manual_seed(0)
    return CpuOps(1, isa="amx"), CpuOps(1, isa="avx512_vnni")


def random_weight(name: str, n: int, k: int, group: int) -> Weight:
    return Weight("dense", torch.randn(n, k)) if name == "nl4" else weight(name, n, k, group)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(("n", "k", "group"), [(100, 192, 32), (48, 512, 64), (33, 256, 128)])
def test_products_have_the_bits_of_vectors(
    both: tuple[CpuOps, CpuOps], name: str, n: int, k: int, group: int
) -> None:
    w, x, scale = random_weight(name, n, k, group), torch.randn(ROWS, k), norm(k)
    target = plan([w], "int4" if name == "nl4" else None)

    def product(ops: CpuOps, rows: int) -> Tensor:
        handle = Linear(pack(ops._native, [w], target), n, k)
        return ops.linear(x[:rows].clone(), handle, Norm(scale, EPS))

    expected = product(both[1], ROWS)
    for rows in (1, 12, 13, 16, 17, 32, 33, 48, 64, ROWS):
        assert torch.equal(product(both[0], rows), expected[:rows])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_experts_have_the_bits_of_vectors(both: tuple[CpuOps, CpuOps], name: str) -> None:
    spec = ROUTERS["v3"]
    parts, x, scale = experts(spec, name, 192, 128, 256), torch.randn(ROWS, 192), norm(192)
    tiles, vectors = (
        ops.moe(x.clone(), ops.pack_moe("m", spec, lambda: parts), Norm(scale, EPS)) for ops in both
    )
    assert torch.equal(tiles, vectors)


def test_prompts_round_inputs_to_4_bits_as_decoding_does(both: tuple[CpuOps, CpuOps]) -> None:
    """A matrix trained for 4-bit inputs (W4A4)."""
    w = replace(weight("int4", 64, 256, 64), inputs=InputRounding(4, clip=0.9))
    x = torch.randn(ROWS, 256)
    handles = [ops.pack_linear("w", lambda: [w]) for ops in both]
    expected = torch.cat([both[1].linear(row[None].clone(), handles[1]) for row in x])
    assert torch.equal(both[0].linear(x, handles[0]), expected)
    for rows in (1, 32, 33):
        assert torch.equal(both[0].linear(x[:rows].clone(), handles[0]), expected[:rows])
