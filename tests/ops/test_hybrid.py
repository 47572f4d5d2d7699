"""Experts on the host, the rest on a device (here: reference ops); hot experts change no token."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from farthing.config import EngineConfig
from farthing.engine.request import SamplingParams
from farthing.llm import LLM
from farthing.model.config import ModelConfig
from farthing.model.load import load, random_model
from farthing.model.parameters import random_parameters
from farthing.ops.api import Ops
from farthing.ops.hybrid import DECIDE_EVERY, MARGIN, ExpertCache, HybridMoE, HybridOps, rows_of
from farthing.ops.reference import ReferenceOps
from farthing.ops.select import select
from tests.parallel.test_cluster import greedy
from tests.parity import paged
from tests.tiny import LONGCAT, SMALL_V3

RAW = SMALL_V3 | dict(num_experts_per_tok=3, topk_group=2)
PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Stack:\n    def"]


def native() -> Ops:
    pytest.importorskip("farthing._native")
    return select("cpu", torch.float32, 1)


def layers(model: Any) -> list[HybridMoE]:
    blocks = [f for _, f in model.layers] + [m.feed_forward for m in model.mtp]
    return [b.packed for b in blocks if b.is_moe]


@pytest.mark.parametrize("hot", [0, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_models_generate_the_tokens_of_the_plain_engine(hot: int, seed: int) -> None:
    config = ModelConfig.from_json(RAW)
    expected = greedy(random_model(config, select("reference"), seed), 27)
    ops = HybridOps(select("reference"), native(), hot)
    model = random_model(config, ops, seed)
    assert greedy(model, 27) == expected
    ops.settle()
    assert greedy(model, 27) == expected
    for layer in layers(model):
        assert len(layer.hot.handles) <= hot
        assert set(layer.hot.handles) - {layer.hot.evicted} == layer.hot.cache.resident
    assert bool(hot) == any(layer.hot.handles for layer in layers(model))


@pytest.mark.parametrize("hot", [0, 6])
def test_identity_experts_stay_on_the_host(hot: int) -> None:
    config = ModelConfig.from_json(LONGCAT)
    prompt = torch.arange(2, 13)
    expected = paged.greedy(random_model(config, select("reference"), 1), prompt, 27)
    ops = HybridOps(select("reference"), native(), hot)
    model = random_model(config, ops, 1)
    for _ in range(2):
        assert paged.greedy(model, prompt, 27) == expected
        ops.settle()
    assert all(set(layer.hot.handles) <= set(range(6)) for layer in layers(model))


@pytest.mark.parametrize("mass", [None, 0.6])
@pytest.mark.parametrize("tokens", [1, 7])
def test_layer_with_any_set_of_hot_experts(tokens: int, mass: float | None) -> None:
    """Any set of experts on the device, including unselected experts and skipped choices."""
    config = ModelConfig.from_json(RAW)
    plain, ops = select("reference"), HybridOps(select("reference"), native(), 8)
    models = [random_model(config, o, 5) for o in (plain, ops)]
    (_, one), (_, two) = (m.layers[2] for m in models)
    for o, block in ((plain, one), (ops, two)):
        spec = block.packed.spec
        o.reroute(block.packed, replace(spec, mass=mass, min_experts=1))
    x = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(tokens))
    counts = torch.zeros(2, 8, dtype=torch.int64)
    expected = one(x.clone(), counts[0])
    fused = HybridOps(select("reference"), native())
    (_, three) = random_model(config, fused, 5).layers[2]
    fused.reroute(three.packed, two.packed.spec)
    torch.testing.assert_close(three(x.clone(), counts[1]), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts[0], counts[1])
    for held in ([], [0, 1, 2], list(range(8))):
        two.packed.hot.handles = {e: ops._load(two.packed, e) for e in held}
        torch.testing.assert_close(two(x.clone(), counts[1].zero_()), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(counts[0], counts[1])


def test_host_experts_overlap_with_the_shared_expert() -> None:
    """The host's experts are running when the shared expert is computed."""
    begun, shared = threading.Event(), threading.Event()

    class Host(ReferenceOps):
        def moe(self, *arguments: Any) -> torch.Tensor:
            begun.set()
            assert shared.wait(30)
            return super().moe(*arguments)

    class Device(ReferenceOps):
        def mlp(self, *arguments: Any) -> torch.Tensor:
            assert begun.wait(30)
            shared.set()
            return super().mlp(*arguments)

    ops = HybridOps(Device(torch.float32), Host(torch.float32))
    model = random_model(ModelConfig.from_json(RAW | dict(first_k_dense_replace=0)), ops, 1)
    greedy(model, 1)


def test_forwards_without_a_call_of_its_own() -> None:
    """What a wrapper does not override is the wrapped backend's own method."""
    device = ReferenceOps(torch.float32)
    ops = HybridOps(device, native())
    assert ops.mla == device.mla and ops.linear == device.linear and ops.pack_head == device.pack_head
    assert ops.moe != device.moe


def test_device_samples() -> None:
    """A wrapper uses the wrapped backend's sampler."""

    class Device(ReferenceOps):
        def sample(self, logits: torch.Tensor, uniform: torch.Tensor, filters: Any = None) -> torch.Tensor:
            return torch.full((len(logits),), 7)

    ops = HybridOps(Device(torch.float32), ReferenceOps(torch.float32))
    assert ops.sample(torch.zeros(2, 9), torch.zeros(2).double()).tolist() == [7, 7]


def test_bfloat16_device_keeps_the_hosts_contribution() -> None:
    config = ModelConfig.from_json(RAW)
    exact = random_model(config, select("reference"), 3).layers[1][1]
    ops = HybridOps(ReferenceOps(torch.bfloat16), native(), 8)
    block = random_model(config, ops, 3).layers[1][1]
    x = torch.randn(5, config.hidden_size)
    for held in ([], [0, 1, 2, 3, 4, 5, 6, 7]):
        block.packed.hot.handles = {e: ops._load(block.packed, e) for e in held}
        out = block(x.bfloat16())
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), exact(x.bfloat16().float()), rtol=0.03, atol=0.03)


def test_embedded_model_generates_the_tokens_of_the_plain_engine() -> None:
    pytest.importorskip("farthing._native")
    fixed: dict[str, Any] = dict(backend="reference", threads=1, max_model_len=128, num_blocks=32)
    params = SamplingParams(max_tokens=24, temperature=0)

    def tokens(**options: Any) -> list[list[int]]:
        with LLM("mite", **fixed, **options) as llm:
            return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params, use_tqdm=False)]

    expected = tokens()
    assert tokens(experts_on="cpu") == expected
    assert tokens(experts_on="cpu", hot_experts=4, speculate="mtp") == expected


def test_experts_are_mapped_from_a_packed_file(tmp_path: Path) -> None:
    pytest.importorskip("farthing._native")
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    save_file(random_parameters(ModelConfig.from_json(RAW), seed=7), tmp_path / "model.safetensors")
    whole = select("cpu", torch.float32, 1, "int8")
    load(tmp_path, whole)
    whole.save_packed(str(tmp_path / "packed"))
    rounded = HybridOps(select("reference"), select("cpu", torch.float32, 1, "int8"))
    mapped = HybridOps(select("reference"), select("cpu", torch.float32, 1, None, str(tmp_path / "packed")))
    assert greedy(load(tmp_path, mapped)) == greedy(load(tmp_path, rounded))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(experts_on="moon"), "experts_on: got 'moon'; expected one of"),
        (dict(hot_experts=4), "hot_experts: got 4; expected 0 without experts_on"),
        (dict(experts_on="cpu", hot_experts=-1), "hot_experts: got -1; expected an integer >= 0"),
        (dict(experts_on="cpu", tensor_parallel_size=2), "experts_on: got 'cpu' with 2 ranks; expected None"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


# -- rows of a step, and hot experts


@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_rows_of_a_step(tokens: int, k: int, data: st.DataObject) -> None:
    ids = torch.tensor(data.draw(st.lists(st.integers(-1, 5), min_size=tokens * k, max_size=tokens * k)))
    ids = ids.view(tokens, k)
    rows = rows_of(ids.numpy())
    found = [
        (e, t, s)
        for e, at in rows.parts.items()
        for t, s in zip(rows.tokens[at], rows.slots[at], strict=True)
    ]
    assert found == sorted((int(ids[t, s]), t, s) for t in range(tokens) for s in range(k) if ids[t, s] >= 0)


Steps = st.lists(st.dictionaries(st.integers(0, 9), st.integers(1, 8), max_size=4), max_size=60)


@given(st.integers(0, 5), st.floats(1, 500), Steps, st.data())
def test_hot_expert_counts(capacity: int, half_life: float, steps: Any, data: st.DataObject) -> None:
    cache, used = ExpertCache(capacity, half_life), {e: 0.0 for e in range(10)}
    for tokens in steps:
        cache.record(tokens)
        used = {e: u * 0.5 ** (1 / half_life) + tokens.get(e, 0) for e, u in used.items()}
        assert all(abs(cache.use(e) - u) < 1e-6 * (1 + u) for e, u in used.items())
        held = set(cache.resident)
        swap = cache.decide()
        assert len(cache.resident) + len(cache.loading) <= capacity
        if swap:
            leaving, best = swap
            assert best not in held and best in cache.loading and used[best] > 0
            assert all(used[best] >= used[e] * (1 - 1e-9) for e in used if e not in held | cache.loading)
            if leaving is not None:
                assert leaving in held and leaving not in cache.resident
                assert used[leaving] <= min(used[e] for e in held) * (1 + 1e-9)
                assert used[best] > MARGIN * used[leaving] * (1 - 1e-9)
        if cache.loading and data.draw(st.booleans()):
            cache.loaded(min(cache.loading))


@given(st.integers(1, 5), st.lists(st.integers(1, 50), min_size=10, max_size=10, unique=True))
def test_steady_traffic_converges_to_the_busiest_experts(capacity: int, rates: list[int]) -> None:
    cache = ExpertCache(capacity)
    for _ in range(40):
        cache.record(dict(enumerate(rates)))
        if swap := cache.decide():
            cache.loaded(swap[1])
    assert cache.decide() is None
    worst = min(rates[e] for e in cache.resident)
    assert len(cache.resident) == capacity
    assert all(rates[e] <= MARGIN * worst * (1 + 1e-9) for e in range(10) if e not in cache.resident)


def test_hot_experts_follow_the_traffic() -> None:
    """The set of hot experts changes, but not the results."""
    config = ModelConfig.from_json(RAW)
    plain, ops = select("reference"), HybridOps(select("reference"), native(), 1)
    (_, one), (_, two) = (random_model(config, o, 5).layers[1] for o in (plain, ops))
    two.packed.hot.cache = ExpertCache(1, half_life=8)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(4):
        x = torch.randn(1, config.hidden_size, generator=generator)  # the same token repeatedly
        for _ in range(3 * DECIDE_EVERY):
            torch.testing.assert_close(two(x.clone()), one(x.clone()), rtol=1e-5, atol=1e-5)
            ops.settle()
        seen |= set(two.packed.hot.handles)
        assert len(two.packed.hot.handles) <= 1
    assert len(seen) > 1
