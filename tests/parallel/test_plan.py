"""The shard plan: every byte is read, slices are contiguous, and impossible layouts are clear errors."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.model.config import ModelConfig
from farthing.model.kinds import cache_kinds
from farthing.model.load import random_model
from farthing.model.parameters import parameter_shapes, random_parameters
from farthing.model.source import MemorySource
from farthing.ops.cut import Cut, cut_weight
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import InputRounding, Weight, quantize_int4, quantize_int8
from farthing.parallel import rank as rank_module
from farthing.parallel.collectives import Alone
from farthing.parallel.plan import Layout, PlanError, ShardPlan, in_order, own_sequences, place
from farthing.parallel.rank import Rank, ShardedSource
from tests.tiny import DEEPSEEK_V4, GLM4, QWEN3_NEXT, SMALL_V3, V3

layouts = st.tuples(st.sampled_from([1, 2]), st.integers(1, 3), st.sampled_from([1, 2, 4]))


@given(numbers=layouts, tied=st.booleans(), mtp=st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_every_element_is_read_once_per_replica(numbers: tuple[int, int, int], tied: bool, mtp: int) -> None:
    tp, pp, ep = numbers
    config = ModelConfig.from_json(SMALL_V3 | dict(tie_word_embeddings=tied, num_nextn_predict_layers=mtp))
    if ep > 1 and ep % tp:
        return
    layout = Layout(tp, pp, ep)
    plan = ShardPlan.build(config, layout)
    assert [i for stage in plan.stages for i in stage] == list(range(config.num_hidden_layers))
    for name, shape in parameter_shapes(plan.config):
        read = torch.zeros(shape, dtype=torch.int32)
        holders = 0
        for rank in range(layout.world):
            cut = plan.cut(name, layout.place(rank))
            if cut is None:
                continue
            holders += 1
            for start, stop in cut.spans:
                (read if cut.dim is None else read.narrow(cut.dim, start, stop - start)).add_(1)
        assert holders >= 1, f"no rank reads {name}"
        assert read.min() == read.max(), f"{name} is read unevenly"
        if ".experts." in name:
            assert read.max() == 1, f"{name} is on several ranks"


def test_mtp_layers_that_read_streams_are_on_the_last_stage() -> None:
    config = ModelConfig.from_json(DEEPSEEK_V4 | {"num_nextn_predict_layers": 1})
    layout = Layout(pp=2)
    plan = ShardPlan.build(config, layout)
    name = f"model.layers.{config.num_hidden_layers}.e_proj.weight"
    assert [plan.cut(name, layout.place(rank)) for rank in range(2)] == [None, Cut(None)]


def test_v3_on_32_ranks() -> None:
    layout = Layout(tp=8, pp=4, ep=8)
    plan = ShardPlan.build(ModelConfig.from_json(V3), layout)
    names, shapes = zip(*parameter_shapes(plan.config), strict=True)
    cuts = ([plan.cut(name, layout.place(rank)) for name in names] for rank in range(layout.world))

    def read(cut: Cut | None, shape: tuple[int, ...]) -> int:
        if cut is None:
            return 0
        return 2 * prod(shape) if cut.dim is None else 2 * prod(shape) * cut.size // shape[cut.dim]

    heaviest = max(sum(map(read, own, shapes)) for own in cuts)
    assert heaviest < 1.2 * sum(2 * prod(shape) for shape in shapes) / 32


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (dict(tp=0), "tp: got 0; expected at least 1"),
        (dict(tp=2, ep=3), "ep: got 3; expected 1 or a multiple of tp = 2"),
        (dict(tp=4), "tp: got 4; expected a divisor of num_attention_heads = 2"),
        (dict(pp=9), "pp: got 9; expected at most num_hidden_layers = 3"),
        (dict(tp=2, ep=2, dp_attention=True), "dp_attention: got True with ep = 2; expected ep > tp = 2"),
        (dict(ep=16), "ep: got 16; expected a divisor of n_routed_experts = 8"),
    ],
)
def test_errors(layout: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ShardPlan.build(ModelConfig.from_json(SMALL_V3), Layout(**layout))


def stored(kind: str, w: torch.Tensor) -> Weight:
    if kind == "dense":
        return Weight("dense", w)
    if kind == "int8":
        return quantize_int8(w)
    if kind == "int4":
        return quantize_int4(w, 32)
    scale = torch.rand(-(-w.shape[0] // 128), -(-w.shape[1] // 128)) + 0.5
    return Weight("fp8", w.to(torch.float8_e4m3fn), scale)


@pytest.mark.parametrize("spans", [((0, 128), (256, 384)), ((128, 192), (300, 400))])
def test_parts_of_blocks_are_joined_at_their_edges(spans: tuple[tuple[int, int], ...]) -> None:
    weight = stored("fp8", torch.randn(512, 256))
    first, *more = spans
    cut = Cut(0, *first, more=tuple(more))
    found = cut_weight(weight, cut)
    assert torch.equal(found.dequantize(), cut.of(weight.dequantize()))
    assert found.format == ("fp8" if first[0] == 0 else "dense")


MINIMAX = QWEN3_NEXT | dict(model_type="minimax_m2", num_local_experts=6)


@pytest.mark.parametrize("raw", [QWEN3_NEXT, QWEN3_NEXT | dict(model_type="qwen3_5_moe_text"), MINIMAX])
def test_parts_have_the_shapes_of_a_ranks_model(raw: dict[str, Any]) -> None:
    config, layout = ModelConfig.from_json(raw), Layout(tp=2)
    plan = ShardPlan.build(config, layout)
    for rank in range(2):
        local = rank_module.local_config(plan, layout.place(rank))
        for name, shape in parameter_shapes(local):
            cut = plan.cut(name, layout.place(rank))
            assert cut is not None
            if "expert" not in name:
                assert tuple(cut.of(torch.empty(plan.parameters[name].shape)).shape) == shape, name
    states = [kind.state_bytes for kind in cache_kinds(config) if kind.state]
    assert [2 * kind.state_bytes for kind in cache_kinds(config, 2) if kind.state] == states


def test_states_are_not_divided_by_any_number() -> None:
    with pytest.raises(PlanError, match="tp: got 4; expected a divisor of linear_num_key_heads = 2"):
        ShardPlan.build(ModelConfig.from_json(QWEN3_NEXT), Layout(tp=4))


@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "fp8"])
@given(
    dim=st.integers(0, 1),
    part=st.integers(0, 3),
    n=st.sampled_from([8, 128, 192, 512]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_sliced_weight_equals_the_sliced_value(kind: str, dim: int, part: int, n: int, seed: int) -> None:
    w = torch.randn(n, 384, generator=torch.Generator().manual_seed(seed))
    weight = replace(stored(kind, w), inputs=InputRounding(4, 0.9))
    size = w.shape[dim] // 4
    cut = Cut(dim, part * size, (part + 1) * size)
    expected = weight.dequantize().narrow(dim, cut.start, size)
    result = cut_weight(weight, cut)
    assert result.shape == tuple(expected.shape)
    assert result.inputs == weight.inputs
    torch.testing.assert_close(result.dequantize(), expected, rtol=0, atol=0)
    if kind in ("int8", "fp8") and size % 128 == 0:
        assert result.format == kind


numbers = st.tuples(st.sampled_from([2, 3, 4, 8]), st.integers(1, 6), st.integers(0, 8))


@given(numbers=numbers, data=st.data())
@settings(max_examples=150, deadline=None)
def test_placement_is_complete_and_balanced(numbers: tuple[int, int, int], data: st.DataObject) -> None:
    ranks, each, extra = numbers
    experts = ranks * each
    redundant = min(extra, each * (ranks - 1)) * ranks
    tokens = data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    placement = place(tokens, ranks, redundant)
    assert all(len(rank) == (experts + redundant) // ranks for rank in placement.ranks)
    assert all(len(set(rank)) == len(rank) for rank in placement.ranks)
    assert set().union(*placement.ranks) == set(range(experts))
    assert sum(placement.loads(tokens)) == pytest.approx(sum(tokens))
    rows = {(e, t % 24): 0 for e in range(experts) for t in range(24)}
    for rank in range(ranks):
        for (m, j), held in placement.shares(rank).items():
            for e in held:
                for t in range(j, 24, m):
                    rows[e, t] += 1
    if all(24 % sum(e in r for r in placement.ranks) == 0 for e in range(experts)):
        assert set(rows.values()) == {1}  # every row of every expert is computed once


@given(tokens=st.lists(st.integers(0, 10_000), min_size=32, max_size=32))
@settings(max_examples=60, deadline=None)
def test_copies_of_hot_experts_balance_the_load(tokens: list[int]) -> None:
    mean = sum(tokens) / 4
    plain, copied = (max(place(tokens, 4, extra).loads(tokens)) for extra in (0, 8))
    heaviest = max(tokens)
    assert plain <= mean + heaviest or plain <= max(in_order(32, 4).loads(tokens))
    assert copied <= mean + max(heaviest / 2, plain - mean) + 1e-6


def test_one_hot_expert_gets_the_copies() -> None:
    tokens = [1000] + [10] * 7
    placement = place(tokens, 4, 4)
    assert sum(0 in rank for rank in placement.ranks) == 4
    assert max(placement.loads(tokens)) < 1000 / 4 + 3 * 10


@pytest.mark.parametrize(
    ("redundant", "message"),
    [(1, "expected a multiple in total, such as redundant = 4"), (28, "expected 0…24"), (-4, "expected 0…")],
)
def test_experts_errors(redundant: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place([1] * 8, 4, redundant)


class Sum(Alone):
    """A group whose ranks this process simulates in turn; the test computes the sums."""

    size = 2

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_rebalancing_preserves_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks' parts of a layer add up to the full result before and after placing copies."""
    config = ModelConfig.from_json(SMALL_V3 | dict(num_experts_per_tok=3, topk_group=2, n_shared_experts=1))
    parameters = random_parameters(config, seed=3)
    whole = random_model(config, select("reference"), seed=3)
    monkeypatch.setattr(rank_module, "DistGroup", lambda ranks, timeout: Sum())
    ranks = [Rank(config, MemorySource(parameters), Layout(ep=2), i, select("reference")) for i in range(2)]
    x = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(1))
    layer = 1
    block = whole.layers[layer][1]
    expected = block(x.clone())

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        total, counts = x.clone(), torch.zeros(8, dtype=torch.int64)
        for rank in ranks:
            own = torch.zeros(8, dtype=torch.int64)
            total += rank.model.layers[layer][1](x.clone(), own) - x
            counts = own if rank.place.local == 0 else counts
        return total, counts

    before, counts = both()
    torch.testing.assert_close(before, expected)
    assert counts.sum() == 9 * 3
    for rank in ranks:
        rank.rebalance({layer: [50, 1, 1, 1, 1, 1, 1, 40]}, redundant=2)
    assert sum(0 in held for held in ranks[0].placements[layer].ranks) == 2
    assert ranks[0].placements == ranks[1].placements
    after, again = both()
    torch.testing.assert_close(after, expected)
    assert torch.equal(again, counts)


def test_micro_batches_compute_the_same_states() -> None:
    from farthing.parallel import plan

    config = ModelConfig.from_json(SMALL_V3)
    model = random_model(config, select("reference"), seed=5)
    batch = make_batch([20, 3, 17], [0, 0, 0], [[0, 1, 2], [3], [4, 5, 6]], 8)
    ids = torch.arange(40) % config.vocab_size
    whole = model.forward(ids, batch, model.new_cache(8, 8, "float32"))
    cache, parts = model.new_cache(8, 8, "float32"), []
    for a, b in ((0, 7), (7, 21), (21, 22), (22, 40)):
        parts.append(model.forward(ids[a:b], plan.rows_of(batch, a, b), cache))
    torch.testing.assert_close(torch.cat(parts), whole)
    assert [rows for rows, _ in plan.micro_batches(batch, 4)] == [slice(0, 40)]  # too few rows to split


@given(
    blocks=st.permutations(range(7)),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    data=st.data(),
)
def test_every_row_is_in_one_group_of_ranks(
    blocks: list[int], lengths: list[int], data: st.DataObject
) -> None:
    """A group without sequences has a batch all the same, of which no row is kept."""
    copies = data.draw(st.integers(1, 4))
    batch = make_batch(lengths, [0] * len(lengths), [[b] for b in blocks[: len(lengths)]], 16)
    groups = [own_sequences(batch, copies, copy) for copy in range(copies)]
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(sum(lengths)))
    for rows, own in groups:
        assert len(own.positions) == max(len(rows), 1)
        assert torch.equal(own.positions[: len(rows)], batch.positions[rows])


def test_scales_of_the_cache_are_those_of_every_rank() -> None:
    plan = ShardPlan.build(ModelConfig.from_json(GLM4), Layout(tp=2, pp=2))
    first = f"model.layers.{plan.stages[1].start}."
    names = [f"{first}self_attn.{part}" for part in ("k_scale", "v_proj.v_scale")]
    source = MemorySource({name: torch.full((1,), 3.0) for name in names})
    for index in (2, 3):  # of the second stage
        rank = ShardedSource(source, plan, plan.layout.place(index))
        for name in (name.replace(first, "model.layers.0.") for name in names):
            assert rank.has(name) and float(rank.tensor(name)) == 3
        assert not rank.has("model.layers.0.self_attn.v_scale")
