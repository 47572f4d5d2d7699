"""Latent attention, decode and expanded, with every cache dtype against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from farthing.ops.api import Batch, Place
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import AttentionSpec, GroupedParts, GroupedSpec
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight
from farthing_gpu import GpuOps, attention
from farthing_gpu.attention import decode, splits_for
from farthing_gpu.launch import Config
from tests.gpu.parts import DEVICE, norm
from tests.ops.parts import distance
from tests.ops.test_gqa import Case, error, in_steps, shows_what_is_not_finite

SPECS = {
    "small": AttentionSpec(4, 8, 8, 8, 32, 0.2),
    "halves": AttentionSpec(3, 12, 8, 20, 48, 0.2, interleaved=False),
    "many_heads": AttentionSpec(20, 16, 16, 16, 32, 0.2),
}
CACHES = {"float32": 1e-9, "bfloat16": 1e-4, "fp8": 4e-3, "int8": 1e-4}
# (cached tokens, tokens of this step) per sequence: prompts, a chunk with single tokens, decoding.
STEPS = [[(0, 5), (0, 37), (0, 1)], [(5, 1), (37, 26), (1, 3)], [(6, 1), (63, 1), (4, 1)]]


def moved(batch: Batch) -> Batch:
    tensors = {f: value.to(DEVICE) for f in Batch.__slots__ if isinstance(value := getattr(batch, f), Tensor)}
    return replace(batch, **tensors)


def outputs(
    ops: Any, spec: AttentionSpec, w: Weight, parts: dict[str, Any], cache_dtype: str
) -> list[Tensor]:
    handle = ops.pack_attention("a", spec, lambda: (w, parts["norm"]), parts["rope"])
    cache = ops.new_cache(2, 24, 16, spec.latent_dim + spec.rope_dim, cache_dtype)
    device = ops.device
    results = []
    for step, (q, kv) in zip(STEPS, parts["inputs"], strict=True):
        tables = [[3, 9], [0, 21, 7, 1, 2, 20, 11], [5]]
        batch = make_batch([new for _, new in step], [cached for cached, _ in step], tables, 16)
        batch = moved(batch) if device.type == "cuda" else batch
        q, kv = q.to(device, ops.dtype), kv.to(device, ops.dtype)
        results.append(ops.mla(q, kv, handle, Place(cache, 1, batch)).cpu())
    assert not cache.data[0].float().any()  # layer 0 is not written
    return results


def inputs_of(spec: AttentionSpec) -> tuple[Weight, dict[str, Any]]:
    rows = spec.num_heads * (spec.nope_dim + spec.value_dim)
    w = Weight("dense", torch.randn(rows, spec.latent_dim) / spec.latent_dim**0.5)
    angles = torch.rand(128, spec.rope_dim // 2) * 6
    parts: dict[str, Any] = {
        "rope": torch.stack((angles.cos(), angles.sin())),
        "norm": norm(spec.latent_dim),
        "inputs": [
            (
                torch.randn(tokens, spec.num_heads * (spec.nope_dim + spec.rope_dim)),
                torch.randn(tokens, 8 + spec.latent_dim + spec.rope_dim)[:, 8:],
            )
            for tokens in (sum(new for _, new in step) for step in STEPS)
        ],
    }
    return w, parts


@pytest.mark.parametrize(
    ("name", "cache_dtype", "dtype"),
    [
        ("small", "fp8", torch.float32),
        ("small", "int8", torch.bfloat16),
        ("halves", "bfloat16", torch.float32),
        *(
            pytest.param(*case, torch.float32, marks=pytest.mark.slow)
            for case in (("small", "float32"), ("halves", "int8"), ("many_heads", "float32"))
        ),
    ],
)
def test_mla(name: str, cache_dtype: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small tiles, so that a prompt has several and some are on the diagonal.
    monkeypatch.setattr(attention, "config", lambda *_: Config(bm=16, bk=16))
    spec = SPECS[name]
    w, parts = inputs_of(spec)
    ours = outputs(GpuOps(dtype, DEVICE), spec, w, parts, cache_dtype)
    expected = outputs(ReferenceOps(torch.float32), spec, w, parts, cache_dtype)
    for y, z in zip(ours, expected, strict=True):
        assert distance(y, z) < (CACHES[cache_dtype] if dtype is torch.float32 else 1e-3)


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
def test_what_is_not_finite_shows(cache_dtype: str) -> None:
    """A NaN in a latent or an infinity in a rotary key, in all tokens that read it."""
    w, parts = inputs_of(SPECS["small"])
    parts["inputs"][0][1][30, 4] = float("nan")  # of the second sequence
    parts["inputs"][1][1][-1, -1] = float("inf")  # of the third
    found = outputs(GpuOps(torch.float32, DEVICE), SPECS["small"], w, parts, cache_dtype)
    lost = [[*range(30, 42)], [*range(1, 27), 29], [1, 2]]
    for y, rows in zip(found, lost, strict=True):
        assert y[rows].isnan().all()
        y[rows] = 0
    found[0][5:30] = 0  # before it in the same step, its weight of 0 is multiplied by it
    assert all(torch.isfinite(y).all() for y in found)
    shows_what_is_not_finite(GpuOps(torch.float32, DEVICE), cache_dtype)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_splits_agree_even_if_some_have_no_keys(splits: int) -> None:
    ops = GpuOps(torch.float32, DEVICE)
    cache = ops.new_cache(1, 40, 16, 40, "float32")
    cache.data.normal_()
    q, pe = torch.randn(3, 3, 32, device=DEVICE), torch.randn(3, 3, 8, device=DEVICE)
    table = torch.randperm(40, device=DEVICE).view(2, 20).int()
    where = torch.tensor([0, 299, -1], dtype=torch.int32, device=DEVICE)
    order = torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
    y = decode(q, pe, cache, 0, table, order, where, 0.3, splits).cpu()
    assert not y[2].any()  # a token that attends to nothing
    for i, length in enumerate((1, 300)):
        keys = cache.data[0][table[i].long()].flatten(0, 1)[:length].cpu()
        scores = (torch.cat((q, pe), -1)[i].cpu() @ keys.t()) * 0.3
        assert distance(y[i], scores.softmax(-1) @ keys[:, :32]) < 1e-10


@pytest.mark.parametrize(
    ("queries", "heads", "keys", "splits"),
    [
        (128, 128, 65536, 1),  # already enough programs
        (16, 128, 8192, 4),  # 32 programs: four splits are one wave of 128, and a result costs 300 keys
        (1, 128, 65536, 64),
        (20, 16, 8192, 13),  # 260 programs where 264 run at once
        (1, 128, 100, 1),  # not worth the combination
    ],
)
def test_splits_fill_the_device_and_pay_off(queries: int, heads: int, keys: int, splits: int) -> None:
    tile = Config(bm=64, bk=32) if heads == 128 else Config(bm=16, bk=32, per_processor=2)
    assert splits_for(queries, heads, keys, tile, 132) == splits


GROUPED = {
    "biased": GroupedSpec(4, 2, 16, 8, 0.2),
    "interleaved": GroupedSpec(3, 3, 12, 12, 0.2, interleaved=True),
    "whole_norm": GroupedSpec(4, 1, 16, 16, 0.2, whole_norm=True),
    "wide": GroupedSpec(2, 1, 512, 512, 0.05),
}


def grouped_outputs(ops: Any, spec: GroupedSpec, inputs: list[Tensor], cache_dtype: str) -> list[Tensor]:
    torch.manual_seed(1)
    q, k = (h * spec.head_dim if spec.whole_norm else spec.head_dim for h in (spec.num_heads, spec.kv_heads))
    parts = GroupedParts(torch.randn(inputs[0].shape[1]), norm(q), norm(k), v_norm=norm(spec.head_dim))
    handle = ops.pack_grouped(spec, parts, torch.rand(2, 70, spec.rope_dim // 2))
    cache = ops.new_cache(2 * spec.kv_heads, 24, 16, 2 * spec.head_dim, cache_dtype)
    results = []
    for step, qkv in zip(STEPS, inputs, strict=True):
        tables = [[3, 9], [0, 21, 7, 1, 2, 20, 11], [5]]
        batch = make_batch([new for _, new in step], [cached for cached, _ in step], tables, 16)
        batch = moved(batch) if ops.device.type == "cuda" else batch
        qkv = qkv.to(ops.device, ops.dtype, copy=True)
        results.append(ops.gqa(qkv, handle, Place(cache, spec.kv_heads, batch)).cpu())
    assert not cache.data[: spec.kv_heads].float().any()  # layer 0 is not written
    return results


@pytest.mark.parametrize(
    ("name", "cache_dtype"),
    [("biased", "float32"), ("interleaved", "int8"), ("whole_norm", "fp8"), ("wide", "bfloat16")],
)
def test_grouped_heads_agree_with_the_reference(name: str, cache_dtype: str) -> None:
    """Long chunks take torch's attention, few tokens the latent kernel, in the same step too."""
    spec = GROUPED[name]
    torch.manual_seed(0)
    width = (spec.num_heads + 2 * spec.kv_heads) * spec.head_dim
    inputs = [torch.randn(sum(new for _, new in step), width) for step in STEPS]
    ours = grouped_outputs(GpuOps(torch.float32, DEVICE), spec, inputs, cache_dtype)
    exact = grouped_outputs(ReferenceOps(torch.float32), spec, inputs, cache_dtype)
    for a, b in zip(ours, exact, strict=True):
        assert distance(a, b) < CACHES[cache_dtype]


@pytest.mark.parametrize(("window", "sinks"), [(None, True), (5, False), (20, True), (64, True)])
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_windows_and_sinks(window: int | None, sinks: bool, cache_dtype: str) -> None:
    """Against float64, and without reading blocks that no token sees (see `tests.ops.test_gqa`)."""
    lengths = [90, 40, 1]
    case = Case.random(GroupedSpec(4, 2, 16, 8, 0.3, window=window), lengths, sinks)
    found = case.run(GpuOps(torch.float32, DEVICE), in_steps(lengths, 0), cache_dtype)
    assert error(found, case.exact()) < CACHES[cache_dtype]


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_keys_of_values(cache_dtype: str) -> None:
    """K = V: the latent kernel finds the elements of a key that do not turn in its value."""
    lengths = [90, 40, 1]
    case = Case.random(GroupedSpec(4, 2, 64, 64, 0.1, turning=16), lengths, sinks=False)
    found = case.run(GpuOps(torch.float32, DEVICE), in_steps(lengths, 0), cache_dtype)
    assert error(found, case.exact()) < CACHES[cache_dtype]


@pytest.mark.parametrize("splits", [1, 2, 5, 8])
def test_splits_of_a_window(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them may have neither keys nor the sink."""
    monkeypatch.setattr(attention, "splits_for", lambda *_: splits)
    case = Case.random(GroupedSpec(4, 1, 16, 16, 0.3, window=40), [150], sinks=True)
    found = case.run(GpuOps(torch.float32, DEVICE), [[(0, 140)], *([(i, 1)] for i in range(140, 150))])
    assert error(found, case.exact()) < CACHES["float32"]
