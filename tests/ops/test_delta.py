"""Gated DeltaNet on every backend against its recurrence in float64, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("farthing._native")

from farthing.ops.api import LatentCache, Ops, Place, StateCache
from farthing.ops.arrays import copy_slots
from farthing.ops.cpu.backend import CpuOps
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import DeltaParts, DeltaSpec
from farthing.ops.torch_backend import TorchOps
from farthing.ops.torch_util import make_batch
from tests.isas import ISAS

SPECS = [
    DeltaSpec(2, 4, 16, 32, 4),
    DeltaSpec(1, 3, 10, 7, 4),  # no whole vectors
    DeltaSpec(3, 3, 24, 80, 3),
    DeltaSpec(2, 4, 128, 128, 4),  # the size of released models
]
EPS = 1e-6
LAYERS, SLOTS = 2, 5
# Steps of up to three sequences: the new tokens of each, and the first position of each.
STEPS = [([5, 1, 40], [0, 0, 0]), ([1, 1, 1], [5, 1, 40]), ([2, 33, 1], [6, 2, 41])]


def parts_of(s: DeltaSpec, seed: int = 0) -> DeltaParts:
    g = torch.Generator().manual_seed(seed)
    heads = s.value_heads
    return DeltaParts(
        conv=torch.randn(s.width, s.channels, generator=g) / 2,
        rate=-torch.rand(heads, generator=g) * 4,
        shift=torch.randn(heads, generator=g),
        norm=1 + 0.1 * torch.randn(s.value_dim, generator=g),
    )


def exact(s: DeltaSpec, p: DeltaParts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """One sequence from its first token on, as the paper defines it, in float64."""
    x, gates = x.double(), gates.double()
    conv, rate, shift, norm = (each.double() for each in (p.conv, p.rate, p.shift, p.norm))
    padded = torch.cat((torch.zeros(s.width - 1, s.channels, dtype=torch.float64), x[:, : s.channels]))
    out, keys = torch.zeros(len(x), s.value_heads, s.value_dim, dtype=torch.float64), s.key_heads * s.key_dim
    states = torch.zeros(s.value_heads, s.key_dim, s.value_dim, dtype=torch.float64)
    for t in range(len(x)):
        mixed = torch.nn.functional.silu((padded[t : t + s.width] * conv).sum(0))
        for h in range(s.value_heads):
            at = h // (s.value_heads // s.key_heads) * s.key_dim
            q, k = mixed[at : at + s.key_dim], mixed[keys + at : keys + at + s.key_dim]
            q, k = (each / (each.square().sum() + 1e-6).sqrt() for each in (q, k))
            v = mixed[2 * keys + h * s.value_dim :][: s.value_dim]
            decay = (rate[h] * torch.nn.functional.softplus(gates[t, s.value_heads + h] + shift[h])).exp()
            states[h] *= decay
            states[h] += torch.outer(k, (v - states[h].T @ k) * gates[t, h].sigmoid())
            o = states[h].T @ q * s.key_dim**-0.5
            out[t, h] = o * (o.square().mean() + EPS).rsqrt() * norm
    z = x[:, s.channels :].view_as(out)
    return (out * torch.nn.functional.silu(z)).flatten(1)


def inputs(s: DeltaSpec, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(length, s.channels + s.values, generator=g),
        torch.randn(length, 2 * s.value_heads, generator=g),
    )


def dirty(ops: Ops, s: DeltaSpec) -> StateCache:
    """States that still hold another sequence's numbers."""
    state = StateCache.new(ops, LAYERS, SLOTS, s)
    for each in state.tensors():
        each += torch.nan
    return state


def place(
    state: StateCache, layer: int, new: Sequence[int], cached: Sequence[int], slots: Sequence[int]
) -> Place:
    cache = LatentCache(torch.empty(0), None, state=state)
    return Place(cache, layer, make_batch(new, cached, [[0] * 40] * len(new), 4, slots))


def found(ops: Ops, s: DeltaSpec, slots: Sequence[int] = (3, 0, 4)) -> list[torch.Tensor]:
    """Each sequence's outputs over STEPS."""
    delta, state = ops.pack_delta("d", s, lambda: parts_of(s)), dirty(ops, s)
    sequences = [inputs(s, 100, b) for b in range(3)]
    out: list[list[torch.Tensor]] = [[], [], []]
    for new, cached in STEPS:
        x, gates = (
            torch.cat(
                [sequences[b][i][at : at + n] for b, (n, at) in enumerate(zip(new, cached, strict=True))]
            )
            for i in range(2)
        )
        y = ops.delta(x.to(ops.dtype), gates, delta, place(state, 1, new, cached, slots))
        for b, part in enumerate(y.float().split(list(new))):
            out[b].append(part)
    assert all(bool(each[0].isnan().all()) for each in state.tensors())  # the other layer's
    return [torch.cat(each) for each in out]


def assert_exact(ops: Ops, s: DeltaSpec, tolerance: float) -> None:
    for b, y in enumerate(found(ops, s)):
        x, gates = inputs(s, 100, b)
        expected = exact(s, parts_of(s), x[: len(y)], gates[: len(y)])
        assert (y - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("s", SPECS, ids=str)
@pytest.mark.parametrize(
    "make", [ReferenceOps, lambda d: TorchOps(torch.device("cpu"), d)], ids=["reference", "torch"]
)
def test_torch_computes_the_recurrence(make: Any, s: DeltaSpec) -> None:
    assert_exact(make(torch.float32), s, 2e-6)
    assert_exact(make(torch.bfloat16), s, 2e-2)


@pytest.mark.parametrize(  # interpreted
    "s", [pytest.param(s, marks=pytest.mark.slow if s is not SPECS[1] else ()) for s in SPECS[:3]], ids=str
)
def test_triton_computes_the_recurrence(s: DeltaSpec) -> None:
    pytest.importorskip("triton")
    from farthing_gpu import GpuOps
    from farthing_gpu.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("the kernels are not interpreted")
    assert_exact(GpuOps(torch.float32, torch.device("cpu")), s, 5e-6)


def test_a_step_takes_the_workspace_of_the_one_before() -> None:
    ops, s = CpuOps(2), SPECS[0]
    delta, state = ops.pack_delta("d", s, lambda: parts_of(s)), StateCache.new(ops, LAYERS, SLOTS, s)
    taken = set()
    for cached in range(0, 120, 40):
        ops.delta(*inputs(s, 40, cached), delta, place(state, 1, [40], [cached], [3]))
        taken.add(ops._native.workspace_bytes)
    assert len(taken) == 1 and 0 not in taken


@pytest.mark.parametrize("s", SPECS, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_compute_the_recurrence(isa: str, s: DeltaSpec) -> None:
    assert_exact(CpuOps(2, isa=isa), s, 2e-6)


@pytest.mark.parametrize("s", SPECS, ids=str)
def test_kernels_give_the_same_bits_in_any_chunks(s: DeltaSpec) -> None:
    ops = CpuOps(2)
    delta, (x, gates) = ops.pack_delta("d", s, lambda: parts_of(s)), inputs(s, 45, 0)
    results, states = [], []
    for chunks in ([45], [1] * 45, [16, 17, 1, 11]):
        state, at, out = dirty(ops, s), 0, []
        for n in chunks:
            rows = slice(at, at + n)
            out.append(ops.delta(x[rows], gates[rows], delta, place(state, 0, [n], [at], [2])))
            at += n
        results.append(torch.cat(out))
        states.append(state)
    assert all(torch.equal(y, results[0]) for y in results)
    for one, other in zip(states[0].tensors(), states[1].tensors(), strict=True):
        assert torch.equal(one[0, 2], other[0, 2])


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_copied_state_continues_as_the_original(backend: str) -> None:
    made: dict[str, Ops] = {
        "reference": ReferenceOps(torch.float32),
        "torch": TorchOps(torch.device("cpu"), torch.float32),
        "cpu": CpuOps(1),
    }
    ops, s = made[backend], SPECS[0]
    delta, state, (x, gates) = ops.pack_delta("d", s, lambda: parts_of(s)), dirty(ops, s), inputs(s, 12, 0)
    for layer in range(LAYERS):
        ops.delta(x[:10], gates[:10], delta, place(state, layer, [10], [0], [1]))
    for each in state.tensors():
        copy_slots(each, [(1, 4), (1, 2)])
    assert all(bool(each[:, 3].isnan().all()) for each in state.tensors())
    for layer in range(LAYERS):
        results = [
            ops.delta(x[10:], gates[10:], delta, place(state, layer, [2], [10], [slot])) for slot in (1, 4, 2)
        ]
        assert all(torch.equal(y, results[0]) for y in results)


def test_kernels_serve_numpy_arrays() -> None:
    s, tensors = SPECS[0], CpuOps(1)
    ops = CpuOps(1, arrays=True)
    p, (x, gates) = parts_of(s), inputs(s, 6, 0)
    as_arrays: Any = DeltaParts(*(np.asarray(each) for each in (p.conv, p.rate, p.shift, p.norm)))
    there = place(StateCache.new(tensors, 1, 2, s), 0, [6], [0], [1])
    expected = tensors.delta(x, gates, tensors.pack_delta("d", s, lambda: p), there)
    named = {n: getattr(there.batch, n) for n in there.batch.__slots__}
    fields: Any = {n: np.asarray(each) for n, each in named.items() if isinstance(each, torch.Tensor)}
    cache = replace(there.cache, state=StateCache.new(ops, 1, 2, s))
    given: Any = np.asarray(x), np.asarray(gates)
    here = Place(cache, 0, replace(there.batch, **fields))
    y: Any = ops.delta(*given, ops.pack_delta("d", s, lambda: as_arrays), here)
    assert isinstance(y, np.ndarray)
    assert np.array_equal(y, expected.numpy())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_step_continues_another_slot_and_leaves_it(count: int) -> None:
    """As after a copy of the state; the sequences beside it continue their own slot, or begin."""
    ops, s = CpuOps(2), SPECS[2]
    delta, (x, gates) = ops.pack_delta("d", s, lambda: parts_of(s)), inputs(s, 2 * count + 7, 1)
    state = dirty(ops, s)
    ops.delta(x[:7], gates[:7], delta, place(state, 1, [4, 3], [0, 0], [2, 0]))
    there = place(state, 1, [count, 1, count], [4, 3, 0], [4, 0, 3])
    copied = StateCache(*(each.clone() for each in state.tensors()))
    for each in copied.tensors():
        copy_slots(each, [(2, 4)])
    rows = slice(6, 7 + 2 * count)
    expected = ops.delta(
        x[rows], gates[rows], delta, replace(there, cache=replace(there.cache, state=copied))
    )
    before = [each[1, 2].clone() for each in state.tensors()]
    sources = torch.tensor([2, 0, 3], dtype=torch.int32)
    batch = replace(there.batch, state_sources=sources)
    assert torch.equal(ops.delta(x[rows], gates[rows], delta, replace(there, batch=batch)), expected)
    for mine, theirs, kept in zip(state.tensors(), copied.tensors(), before, strict=True):
        assert torch.equal(mine[1, [0, 4]], theirs[1, [0, 4]]) and torch.equal(mine[1, 2], kept)
        assert torch.equal(mine[1, 3].nan_to_num(7.0), theirs[1, 3].nan_to_num(7.0))


def test_batch_without_slots_is_refused() -> None:
    ops, s = CpuOps(1), SPECS[0]
    delta, (x, gates) = ops.pack_delta("d", s, lambda: parts_of(s)), inputs(s, 2, 0)
    there = place(StateCache.new(ops, 1, 2, s), 0, [2], [0], [1])
    with pytest.raises(ValueError, match="state_slots"):
        ops.delta(x, gates, delta, replace(there, batch=replace(there.batch, state_slots=None)))
