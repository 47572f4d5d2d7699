"""Experts of one layer in different formats, as GPTQModel's `dynamic` and AutoRound's mixtures have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing.ops.api import Norm
from farthing.ops.arrays import dtype_name
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import HELD
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import MoEWeights, RouterSpec
from farthing.ops.torch_backend import TorchOps
from farthing.ops.weights import Weight
from tests.isas import ISAS
from tests.ops.parts import BOUNDS, EPS, FORMATS, SCALED, UNITS, distance, experts, norm, weight
from tests.ops.test_packed_file import never

pytestmark = pytest.mark.usefixtures("exact_on_amx")

REF = ReferenceOps(torch.float32)
NAMES = [*FORMATS, *SCALED, *UNITS, "q5_0", "q5_1"]
SPEC = RouterSpec(len(NAMES), 6)
SIZE = 256


def mixture() -> MoEWeights:
    """Every format once for gate and up, and for down beside another one; groups of two sizes."""

    def of(name: str, n: int, at: int) -> Weight:
        group = 64 if at % 3 == 0 and name in ("int4", "int4_zero", "iq4_nl", "q5_0") else 32
        return weight(name, n, SIZE, group)

    parts = [
        (of(name, SIZE, e), of(name, SIZE, e), of(NAMES[(e + 5) % len(NAMES)], SIZE, e))
        for e, name in enumerate(NAMES)
    ]
    base = experts(SPEC, "int8", SIZE, SIZE, SIZE)
    return replace(base, experts=[lambda p=p: p for p in parts])  # type: ignore[misc]


@pytest.mark.parametrize("isa", ISAS)
def test_every_format_in_one_layer(isa: str) -> None:
    torch.manual_seed(0)
    w, scale, ops = mixture(), Norm(norm(SIZE), EPS), CpuOps(2, isa=isa)
    handle, expected = ops.pack_moe("m", SPEC, lambda: w), REF.pack_moe("m", SPEC, lambda: w)
    for e, load in enumerate(w.experts):  # none is repacked
        assert load is not None
        for stored, packed in zip(load()[1:], ("gate_up", "down"), strict=True):
            held = HELD[ops._blobs[f"m.experts.{e}.{packed}"].format]
            assert held == (dtype_name(stored.data.dtype) if stored.format == "dense" else stored.format)
    x = torch.randn(40, SIZE)
    y, z = ops.moe(x.clone(), handle, scale), REF.moe(x, expected, scale)
    assert distance(y - x, z - x) < 4 * BOUNDS["int4"]
    for rows in (slice(7, 8), slice(20, 33)):
        assert torch.equal(ops.moe(x[rows].clone(), handle, scale), y[rows])


def test_each_expert_computes_as_in_a_layer_of_its_format() -> None:
    torch.manual_seed(0)
    spec = replace(SPEC, top_k=1)
    w, scale, ops, x = replace(mixture(), shared=None), Norm(norm(SIZE), EPS), CpuOps(2), torch.randn(9, SIZE)
    handle = ops.pack_moe("m", spec, lambda: w)
    for e in range(len(NAMES)):
        alone, chosen = CpuOps(2), torch.full((9, 1), e)
        only = replace(w, experts=[load if i == e else None for i, load in enumerate(w.experts)])
        expected = alone.pack_moe("m", spec, lambda o=only: o)  # type: ignore[misc]
        y = ops.moe(x.clone(), handle, scale, None, False, chosen)
        assert torch.equal(y, alone.moe(x.clone(), expected, scale, None, False, chosen))


def test_a_packed_file_of_a_mixture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w, scale, ops, x = mixture(), Norm(norm(SIZE), EPS), CpuOps(1), torch.randn(5, SIZE)
    handle = ops.pack_moe("m", SPEC, lambda: w)
    ops.save_packed(str(tmp_path / "p"))
    mapped = CpuOps(1, packed=str(tmp_path / "p"))
    found = mapped.pack_moe("m", SPEC, never)  # type: ignore[arg-type]
    assert torch.equal(mapped.moe(x.clone(), found, scale), ops.moe(x.clone(), handle, scale))


def test_halves_of_a_mixture() -> None:
    torch.manual_seed(0)
    w, scale, x = mixture(), Norm(norm(SIZE), EPS), torch.randn(5, SIZE)
    ops = CpuOps(2, parts=2)
    y = ops.moe(x.clone(), ops.pack_moe("m", SPEC, lambda: w), scale)
    z = REF.moe(x, REF.pack_moe("m", SPEC, lambda: w), scale)
    assert distance(y - x, z - x) < 4 * BOUNDS["int4"]


def test_the_torch_backend() -> None:
    torch.manual_seed(0)
    w, scale, x = mixture(), Norm(norm(SIZE), EPS), torch.randn(5, SIZE)
    ops = TorchOps(torch.device("cpu"), torch.float32)
    y = ops.moe(x.clone(), ops.pack_moe("m", SPEC, lambda: w), scale)
    assert distance(y - x, REF.moe(x, REF.pack_moe("m", SPEC, lambda: w), scale) - x) < 1e-9
