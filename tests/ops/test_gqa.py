"""Grouped-query attention with windows and sinks on every backend, against float64. Blocks of the cache that
no token of a step sees are given to the ops as a block of NaN, so that reading one fails a test."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import Batch, Ops, Place
from farthing.ops.cpu import CpuOps
from farthing.ops.reference import ReferenceOps, pack_grouped, prepared
from farthing.ops.specs import GroupedParts, GroupedSpec
from farthing.ops.torch_backend import TorchOps
from farthing.ops.torch_util import make_batch
from tests.isas import ISAS
from tests.ops.parts import distance
from tests.ops.test_cpu import MLA_BOUNDS

pytestmark = pytest.mark.pairs

SIZES = {
    "small": GroupedSpec(4, 2, 16, 8, 0.3),
    "odd": GroupedSpec(6, 3, 20, 20, 0.25),
    "gpt_oss": GroupedSpec(16, 2, 64, 64, 0.125),
    "many": GroupedSpec(20, 1, 32, 32, 0.2),  # more heads than a unit has rows
    "gemma4": GroupedSpec(4, 2, 512, 512, 0.05),
    "K = V": GroupedSpec(4, 2, 64, 64, 0.1, turning=16),
    "K = V, odd": GroupedSpec(6, 3, 24, 24, 0.2, turning=6),
}
_EXACT: dict[object, list[Tensor]] = {}
Step = list[tuple[int, int]]  # (cached, new) of each sequence; none has more cached than it had tokens


@dataclass
class Case:
    """Random inputs of sequences that grow step by step."""

    spec: GroupedSpec
    parts: GroupedParts
    rope: Tensor
    qkv: list[Tensor]  # of each sequence

    @classmethod
    def random(cls, spec: GroupedSpec, lengths: list[int], sinks: bool, seed: int = 0) -> Case:
        torch.manual_seed(seed)
        width = (spec.num_heads + 2 * spec.kv_heads) * spec.head_dim
        angles = torch.rand(max(lengths), spec.rope_dim // 2) * 6
        parts = GroupedParts(
            torch.randn(width) * 0.3,
            sinks=torch.randn(spec.num_heads) * 2 if sinks else None,
            v_norm=torch.rand(spec.head_dim) + 0.5,
        )
        qkv = [torch.randn(n, width) for n in lengths]
        if spec.turning is not None:
            angles[:, spec.turning // 2 :] = 0
            columns = spec.kv_heads * spec.head_dim
            for each in (*qkv, parts.bias):
                each[..., -columns:] = each[..., -2 * columns : -columns]
            norms = torch.rand(spec.head_dim) + 0.5, torch.ones(spec.head_dim)
            parts = replace(parts, k_norm=norms[0], v_norm=norms[1])
        return cls(spec, parts, torch.stack((angles.cos(), angles.sin())), qkv)

    def exact(self) -> list[Tensor]:
        """Every sequence whole, [n, H d] float64."""
        key = self.spec, tuple(map(len, self.qkv)), self.parts.sinks is None, float(self.qkv[0].sum())
        if key not in _EXACT:
            _EXACT[key] = self._exact()
        return _EXACT[key]

    def _exact(self) -> list[Tensor]:
        s, out = self.spec, []
        heads = pack_grouped(s, self.parts, self.rope, lambda x: x.double())
        for x in self.qkv:
            at = torch.arange(len(x))
            q, k, v = prepared(x.double(), heads, at)
            if s.cache_scales is not None:
                v, k = (in_e4m3(y, scale) for y, scale in zip((v, k), s.cache_scales, strict=True))
            k, v = (y.repeat_interleave(s.num_heads // s.kv_heads, 1) for y in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) * s.scale
            far = at[None] > at[:, None]
            if s.window is not None:
                far |= at[None] <= at[:, None] - s.window
            scores = scores.masked_fill(far, float("-inf"))
            if heads.parts.sinks is not None:
                column = heads.parts.sinks.view(-1, 1, 1).expand(-1, len(x), 1)
                scores = torch.cat((scores, column), -1)
            weights = scores.softmax(-1)[..., : len(x)]
            out.append(torch.einsum("hts,shd->thd", weights, v).flatten(1))
        return out

    def run(self, ops: Ops, steps: list[Step], cache_dtype: Any = "float32", block: int = 16) -> list[Tensor]:
        """The same, paged, in steps; the last block of the cache is NaN."""
        s = self.spec
        handle = ops.pack_grouped(s, self.parts, self.rope)
        blocks = [-(-len(x) // block) for x in self.qkv]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).tolist()
        tables = [order[sum(blocks[:b]) : sum(blocks[: b + 1])] for b in range(len(blocks))]
        nothing = sum(blocks)
        width = s.head_dim + (s.turning or s.head_dim)
        cache = ops.new_cache(2 * s.kv_heads, nothing + 1, block, width, cache_dtype)
        cache.data[:, nothing] = float("nan") if cache.data.dtype.is_floating_point else 127
        if cache.scale is not None:
            cache.scale[:, nothing] = float("nan")
        out: list[list[Tensor]] = [[] for _ in self.qkv]
        for step in steps:
            some = [b for b, (_, new) in enumerate(step) if new]
            batch = make_batch(
                [step[b][1] for b in some],
                [step[b][0] for b in some],
                [self.seen(tables[b], step[b][0], block, nothing) for b in some],
                block,
            )
            qkv = torch.cat([self.qkv[b][step[b][0] : sum(step[b])] for b in some])
            found = ops.gqa(qkv.to(ops.dtype), handle, Place(cache, s.kv_heads, moved(batch, ops))).cpu()
            for b, rows in zip(some, found.split([step[b][1] for b in some]), strict=True):
                out[b].append(rows.float())
        return [torch.cat(rows) for rows in out]

    def seen(self, table: list[int], cached: int, block: int, nothing: int) -> list[int]:
        first = 0 if self.spec.window is None else max(0, cached + 1 - self.spec.window)
        return [nothing if i < first // block else b for i, b in enumerate(table)]


def in_e4m3(x: Tensor, scale: float) -> Tensor:
    """Rounded with one scale, as other servers do with calibrated ones; what is too large is cut off."""
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale


def moved(batch: Batch, ops: Ops) -> Batch:
    if ops.device.type == "cpu":
        return batch
    names = ("positions", "slots", "query_start", "context_lens", "block_table")
    return Batch(*(getattr(batch, name).to(ops.device) for name in names))


def in_steps(lengths: list[int], seed: int) -> list[Step]:
    """Steps that mix prompts, chunks and single tokens; a sequence may rest."""
    rng, at, steps = random.Random(seed), [0] * len(lengths), []
    while at != lengths:
        sizes = [rng.choice([0, 1, 1, 2, rng.randint(3, 90)]) for _ in lengths]
        new = [min(size, n - done) for size, n, done in zip(sizes, lengths, at, strict=True)]
        if any(new):
            steps.append(list(zip(at, new, strict=True)))
            at = [a + b for a, b in zip(at, new, strict=True)]
    return steps


WINDOWS = [None, 1, 7, 64, 128, 129]
LENGTHS = [331, 40, 130, 1]


def native(isa: str, least: int = 0) -> CpuOps:
    ops = CpuOps(2, isa=isa)
    ops._native.expand_tokens = least
    return ops


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(distance(a, b) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("name", "cache_dtype", "block"),
    [
        ("small", "float32", 4), ("odd", "bfloat16", 16), ("odd", "int8", 16), ("gpt_oss", "bfloat16", 64),
        ("gpt_oss", "fp8", 16), ("gpt_oss", "int8", 16), ("gpt_oss", "float32", 16), ("many", "bfloat16", 16),
        ("gemma4", "bfloat16", 16), ("K = V", "bfloat16", 16), ("K = V", "int8", 16), ("K = V", "fp8", 64),
        ("K = V, odd", "float32", 4), ("K = V, odd", "bfloat16", 16),
    ],
)  # fmt: skip
def test_kernels(isa: str, window: int | None, name: str, cache_dtype: str, block: int) -> None:
    case = Case.random(replace(SIZES[name], window=window), LENGTHS, sinks=True)
    found = case.run(native(isa), in_steps(LENGTHS, 0), cache_dtype, block)
    assert error(found, case.exact()) < MLA_BOUNDS[cache_dtype]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "cache_dtype", "window"),
    [
        *(
            pytest.param(*case, window, marks=pytest.mark.slow if window in (30, 700) else ())
            for case in (
                ("odd", "float32"), ("small", "bfloat16"), ("small", "int8"), ("K = V", "bfloat16"),
                ("K = V, odd", "float32"),
            )
            for window in (None, 30, 200, 700)
        ),
        ("gemma4", "bfloat16", None), ("gemma4", "bfloat16", 200),  # wide heads are slow
    ],
)  # fmt: skip
def test_large_chunks_of_long_prompts(isa: str, window: int | None, name: str, cache_dtype: str) -> None:
    """They take expanded attention from position 1,024 on; other chunks of it give the same bits."""
    lengths = [1150, 1080]
    case = Case.random(replace(SIZES[name], window=window), lengths, sinks=True)
    ways = [[(0, 1020, 1077, 1150), (0, 1079, 1080)], [(0, 1020, 1101, 1150), (0, 1079, 1080)]]
    found = []
    for cuts in ways:
        steps = []
        for i in range(3):
            spans = [list(pairwise(c))[i] if i < len(c) - 1 else (0, 0) for c in cuts]
            steps.append([(a, b - a) for a, b in spans])
        found.append(case.run(native(isa, 40), steps, cache_dtype))
        assert error(found[-1], case.exact()) < MLA_BOUNDS[cache_dtype]
    absorbed = case.run(native(isa), steps, cache_dtype)
    assert not torch.equal(found[0][0][1024:], absorbed[0][1024:])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "cache_dtype"),
    [("odd", "float32"), ("odd", "bfloat16"), ("gpt_oss", "int8"), ("gpt_oss", "fp8")],
)
@pytest.mark.parametrize("window", [5, 100])
def test_bits_do_not_depend_on_the_batch(isa: str, name: str, cache_dtype: str, window: int) -> None:
    case = Case.random(replace(SIZES[name], window=window), LENGTHS, sinks=True)
    ways = [
        [[(0, n) for n in LENGTHS]],
        *([in_steps(LENGTHS, seed) for seed in (1, 2)]),
        [[(i, 1) if i < n else (n, 0) for n in LENGTHS] for i in range(max(LENGTHS))],
    ]
    first, *others = (case.run(native(isa), steps, cache_dtype) for steps in ways)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sink", [-1e4, 1e4, float("-inf")])
def test_extreme_sinks(isa: str, sink: float) -> None:
    case = Case.random(replace(SIZES["small"], window=70), [150], sinks=True)
    assert case.parts.sinks is not None
    case.parts.sinks[1:] = sink
    found = case.run(native(isa), [[(0, 150)]])
    assert torch.allclose(found[0], case._exact()[0].float(), atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("name", "cache_dtype"),
    [
        ("small", "float32"),
        ("odd", "float32"),
        ("many", "int8"),
        ("K = V", "float32"),
        ("K = V, odd", "int8"),
    ],
)
def test_torch(backend: str, window: int | None, sinks: bool, name: str, cache_dtype: str) -> None:
    device = torch.device("cpu")
    ops = ReferenceOps(torch.float32) if backend == "reference" else TorchOps(device, torch.float32)
    case = Case.random(replace(SIZES[name], window=window), LENGTHS, sinks)
    found = case.run(ops, in_steps(LENGTHS, 0), cache_dtype)
    assert error(found, case.exact()) < MLA_BOUNDS[cache_dtype]


SCALES = (0.004, 0.003)  # of values and keys, some of which are above 448 times as large


@pytest.mark.parametrize("backend", ["reference", "torch", *ISAS])
@pytest.mark.parametrize("window", [None, 64])
def test_calibrated_scales_of_an_fp8_cache(backend: str, window: int | None) -> None:
    """They replace those of every row, and only there."""
    spec = replace(SIZES["odd"], window=window)
    fixed, own = (
        Case.random(replace(spec, cache_scales=scales), LENGTHS, sinks=True) for scales in (SCALES, None)
    )
    assert max(float(in_e4m3(x, s).abs().max()) for x in fixed.qkv for s in SCALES) < 1.8  # cut off at 448
    device = torch.device("cpu")
    made: dict[str, Ops] = {"reference": ReferenceOps(torch.float32)}
    made["torch"] = TorchOps(device, torch.float32)
    ops = made.get(backend) or native(backend)
    steps = in_steps(LENGTHS, 0)
    found = fixed.run(ops, steps, "fp8")
    assert error(found, fixed.exact()) < (1e-5 if backend in made else MLA_BOUNDS["bfloat16"])
    assert error(found, own.exact()) > 3 * MLA_BOUNDS["fp8"] > error(own.run(ops, steps, "fp8"), own.exact())
    same = zip(fixed.run(ops, steps, "int8"), own.run(ops, steps, "int8"), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def shows_what_is_not_finite(ops: Ops, cache_dtype: str, scales: tuple[float, float] | None = None) -> None:
    """In every later token and head that reads it, and in no other sequence or head. Before it in the same
    step, its weight of 0 may be multiplied by it; native kernels do not (test_damaged_rows.py)."""
    case = Case.random(replace(SIZES["odd"], cache_scales=scales), [90, 40, 40], sinks=True)
    heads, groups, size = 6, 3, 20
    key, value = heads * size + 3, (heads + groups + 1) * size + 3  # of the first group, of the second
    case.qkv[0][30, key] = case.qkv[0][40, value] = float("nan")
    case.qkv[1][39, key] = float("inf")
    steps = [[(0, 28), (0, 30), (0, 0)], [(28, 40), (30, 10), (0, 40)], [(68, 22), (0, 0), (0, 0)]]
    found = [x.view(len(x), groups, -1).isnan() for x in case.run(ops, steps, cache_dtype)]
    assert found[0][30:, 0].all() and found[0][40:, 1].all() and found[1][39, 0].all()
    found[0][28:, :2], found[1][30:, 0] = False, False
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("backend", ["reference", "torch", *ISAS])
@pytest.mark.parametrize(("cache_dtype", "scales"), [("int8", None), ("fp8", None), ("fp8", SCALES)])
def test_what_is_not_finite_shows(backend: str, cache_dtype: str, scales: tuple[float, float] | None) -> None:
    made: dict[str, Ops] = {"reference": ReferenceOps(torch.float32)}
    made["torch"] = TorchOps(torch.device("cpu"), torch.float32)
    shows_what_is_not_finite(made.get(backend) or native(backend), cache_dtype, scales)
