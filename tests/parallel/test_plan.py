"""The shard plan: every byte is read, slices are contiguous, and impossible layouts are clear errors."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.model import ModelConfig
from farthing.ops import Weight
from farthing.ops.cutting import Cut, cut_weight
from farthing.ops.weights import InputRounding, quantize_int4, quantize_int8
from farthing.parallel.plan import Layout, PlanError, ShardPlan
from tests.tiny import SMALL_V3, V3

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
    for name, shape in plan.shapes.items():
        read = torch.zeros(shape, dtype=torch.int32)
        holders = 0
        for rank in range(layout.world):
            cut = plan.cut(name, layout.place(rank))
            if cut is None:
                continue
            holders += 1
            (read if cut.dim is None else read.narrow(cut.dim, cut.start, cut.stop - cut.start)).add_(1)
        assert holders >= 1, f"no rank reads {name}"
        assert read.min() == read.max(), f"{name} is read unevenly"
        if ".experts." in name:
            assert read.max() == 1, f"{name} is on several ranks"


def test_v3_on_32_ranks() -> None:
    layout = Layout(tp=8, pp=4, ep=8)
    plan = ShardPlan.build(ModelConfig.from_json(V3), layout)
    whole = sum(2 * prod(s) for s in plan.shapes.values())
    heaviest = max(plan.weight_bytes(layout.place(r)) for r in range(layout.world))
    assert heaviest < 1.2 * whole / 32


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
