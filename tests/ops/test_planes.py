"""An 8-bit head whose high nibbles are stored apart: the same logits and tokens as a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.ops.api import Norm, NotFinite
from farthing.ops.cpu import CpuOps, formats
from farthing.ops.cpu.weights import Linear
from farthing.ops.weights import Weight
from tests.isas import ISAS, threads_of
from tests.ops.parts import EPS, norm, weight

pytestmark = [pytest.mark.pairs, pytest.mark.usefixtures("exact_on_amx")]


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuOps:
    monkeypatch.setattr(formats, "PLANES_FROM", 0)
    torch.manual_seed(0)
    return CpuOps(threads_of(request.param), isa=request.param)


def heads(ops: CpuOps, w: Weight) -> tuple[Any, Any]:
    """The same head plain and in planes."""
    dense = formats.pack(ops._native, [w], formats.Plan(_native.Format.Q8), blocks=False)
    plain, planes = Linear(dense, *w.shape), ops.pack_head("planes", lambda: w)
    assert (plain.packed.format, planes.packed.format) == (_native.Format.Q8, _native.Format.Q8_PLANES)
    return plain, planes


@pytest.mark.parametrize("k", [64, 100, 320])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_bits_and_tokens_of_a_plain_head(ops: CpuOps, k: int, tokens: int) -> None:
    plain, planes = heads(ops, weight("int8", 3001, k))
    x, scale = torch.randn(tokens, k), norm(k)
    expected = ops.logits(x, plain, Norm(scale, EPS))
    assert torch.equal(ops.logits(x, planes, Norm(scale, EPS)), expected)
    for top in (1, 5):
        for a, b in zip(
            ops.top_logits(x, planes, Norm(scale, EPS), top),
            ops.top_logits(x, plain, Norm(scale, EPS), top),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert ops.greedy(x, planes, Norm(scale, EPS)) == expected.argmax(-1).tolist()


def test_rows_are_rounded_as_in_a_plain_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PLANES_FROM", 0)
    ops, w = CpuOps(2, "int8"), weight("bf16", 500, 192)
    plain, planes = heads(ops, w)
    x = torch.randn(3, 192)
    assert torch.equal(ops.linear(x, planes), ops.linear(x, plain))
    assert planes.packed.nbytes == plain.packed.nbytes


def test_equal_logits(ops: CpuOps) -> None:
    row = torch.randint(-127, 128, (1, 64), dtype=torch.int8)
    _, planes = heads(ops, Weight("int8", row.expand(2000, -1), torch.ones(2000, 1)))
    assert ops.greedy(torch.randn(3, 64), planes, Norm(norm(64), EPS)) == [0, 0, 0]


def aligned(x: Tensor, rows: int) -> Weight:
    """Low nibbles that are 15 or 0 with the sign of x, or against it: no high nibbles tell which row wins."""
    against = torch.randint(0, 2, (rows, 1)).bool()
    low = ((x > 0) ^ against).to(torch.int16) * 15
    high = torch.randint(0, 16, (rows, x.shape[1]), dtype=torch.int16)
    return Weight("int8", (16 * high + low - 128).clamp(-127).to(torch.int8), torch.ones(rows, 1))


def test_weights_that_break_the_bound_are_read_whole(ops: CpuOps) -> None:
    for _ in range(8):
        x, scale = torch.randn(1, 1024), torch.ones(1024)
        plain, planes = heads(ops, aligned(x, 640))
        assert (
            ops.greedy(x, planes, Norm(scale, EPS))
            == ops.logits(x, plain, Norm(scale, EPS)).argmax(-1).tolist()
        )
        ops.forget("planes")


@pytest.mark.parametrize("outlier", [50, 200, 1000])
@pytest.mark.parametrize("mean", [-0.4, -0.1, 0.1])
def test_rows_with_an_outlier(ops: CpuOps, outlier: float, mean: float) -> None:
    """Their other weights round to -1, 0 and 1: low nibbles of 15, 0 and 1, far from evenly spread."""
    k = 2048
    for _ in range(4):
        x, w = torch.randn(1, k) + mean, 0.02 * torch.randn(400, k)
        at = int(x[0].abs().argmax())
        w[77, at] = 0.02 * outlier * x[0, at].sign()
        scale = w.abs().amax(1, keepdim=True) / 127
        plain, planes = heads(ops, Weight("int8", (w / scale).round().to(torch.int8), scale))
        expected = ops.logits(x, plain, Norm(torch.ones(k), EPS)).argmax(-1).tolist()
        assert ops.greedy(x, planes, Norm(torch.ones(k), EPS)) == expected
        ops.forget("planes")


def test_head_of_uneven_rows_is_read_whole(ops: CpuOps) -> None:
    w = torch.zeros(500, 128, dtype=torch.int8)
    w[torch.arange(500), torch.arange(500) % 128] = 127
    plain, planes = heads(ops, Weight("int8", w, torch.rand(500, 1) + 0.5))
    x, scale = torch.randn(5, 128) - 0.2, norm(128)
    assert (
        ops.greedy(x, planes, Norm(scale, EPS)) == ops.logits(x, plain, Norm(scale, EPS)).argmax(-1).tolist()
    )


def test_logits_that_are_not_finite(ops: CpuOps) -> None:
    _, planes = heads(ops, weight("int8", 1100, 64))
    with pytest.raises(NotFinite, match="weights are broken"):
        ops.greedy(torch.full((2, 64), float("nan")), planes, Norm(torch.ones(64), EPS))


@pytest.mark.parametrize("topology", ["", "0;1"])
def test_packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topology: str) -> None:
    monkeypatch.setattr(formats, "PLANES_FROM", 0)
    ops, x, scale = CpuOps(2, topology=topology), torch.randn(4, 128), norm(128)
    plain, planes = heads(ops, weight("int8", 900, 128))
    path = str(tmp_path / "packed")
    ops.save_packed(path)
    for nodes in ("", "0;1"):
        mapped = CpuOps(2, packed=path, topology=nodes)
        again = mapped.pack_head("planes", pytest.fail)
        assert torch.equal(mapped.logits(x, again, Norm(scale, EPS)), ops.logits(x, plain, Norm(scale, EPS)))
        assert mapped.greedy(x, again, Norm(scale, EPS)) == ops.greedy(x, planes, Norm(scale, EPS))


def test_packed_file_with_planes_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "PLANES_FROM", 0)
    ops, path = CpuOps(1), tmp_path / "packed"
    heads(ops, weight("int8", 100, 64))
    ops.save_packed(str(path))
    file = bytearray(path.read_bytes())
    file[file.index(b"GPCK") + 28] = 0  # Header::planes of native/pack/packed_file.cpp
    path.write_bytes(file)
    with pytest.raises(ValueError, match="earlier version; pack the model again"):
        CpuOps(1, packed=str(path)).pack_head("planes", pytest.fail)


def test_only_large_heads_of_integers_are_split() -> None:
    q8, bf16 = formats.Plan(_native.Format.Q8), formats.Plan(_native.Format.BF16)
    for rows, columns in ((129280, 7168), (102400, 2048)):
        assert formats.for_head(q8, rows, columns).format == _native.Format.Q8_PLANES
    assert formats.for_head(q8, 32000, 1024) == q8
    assert formats.for_head(bf16, 129280, 7168) == bf16
