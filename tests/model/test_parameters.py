"""Every tensor is declared once, and found by its name."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.model import ModelConfig, Parameters, each_kind, layer_of, tensors_of
from farthing.model.spec import COMPRESSED, Share
from tests.model.answers import configurations

FAMILIES = {name: raw for name, raw in configurations().items() if name.startswith("tiny ")}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_found_by_its_name_and_its_module(name: str) -> None:
    config = ModelConfig.from_json(FAMILIES[name])
    parameters, tensors = Parameters(config), list(tensors_of(config))
    assert max(Counter(tensor.name for tensor in tensors).values()) == 1
    for tensor in tensors:
        assert parameters.find(tensor.name) == tensor == parameters[tensor.name]
        if tensor.name.endswith(".weight"):
            assert parameters.find(tensor.module) == tensor
        assert parameters.rounds(tensor.module) == (tensor.role in COMPRESSED)
        if tensor.role in COMPRESSED:
            assert parameters.reader(tensor.input).input == tensor.input
    for absent in ("model.layers.0.self_attn.no_proj", "model.layers.99999.mlp.gate_proj.weight", "lm"):
        assert parameters.find(absent) is None or layer_of(absent) == 99999


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_have_the_tensors_of_the_first(name: str) -> None:
    config = ModelConfig.from_json(FAMILIES[name])
    per_layer = Counter(
        (layer_of(t.name), t.name.replace(f".experts.{t.expert}.", ".experts.0."), t.shape, t.share)
        for t in tensors_of(config)
        if t.expert is not None
    )
    first = [t for t in each_kind(config) if t.expert is not None]
    assert len(per_layer) == len(first)
    for (layer, *_), count in per_layer.items():
        assert layer is not None and count == config.experts_in(layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_routed_experts_of_a_layer_share_the_scale_of_their_input(name: str) -> None:
    config = ModelConfig.from_json(FAMILIES[name])
    first = (t for t in tensors_of(config) if t.expert is not None and t.reads)
    scales = {(layer_of(t.name), t.scaled_with) for t in first}
    assert len(scales) == len({layer for layer, _ in scales})


@pytest.mark.parametrize("name", FAMILIES)
def test_what_reads_one_input_has_its_width(name: str) -> None:
    """Matrices that read the same have as many columns, and share a scale with all that read a part of it."""
    config = ModelConfig.from_json(FAMILIES[name])
    widths: dict[str, set[int]] = {}
    scales: dict[str, set[str]] = {}
    for tensor in tensors_of(config):
        if tensor.role in COMPRESSED:
            widths.setdefault(tensor.input, set()).add(tensor.shape[1])
            scales.setdefault(tensor.input, set()).add(tensor.scaled_with)
    assert all(len(found) == 1 for found in (*widths.values(), *scales.values()))


@given(
    units=st.integers(1, 8), width=st.integers(1, 40), per=st.integers(1, 4), parts=st.integers(1, 3),
)  # fmt: skip
def test_ranks_divide_whole_heads_of_each_part(units: int, width: int, per: int, parts: int) -> None:
    """Each rank has as much of every part; together they have all, once where no heads are shared."""
    ranks = units if per == 1 else units * per  # with more ranks than heads, each head is on several
    widths = tuple(units * width * (i + 1) for i in range(parts))
    share = Share(0, units, widths)
    read = Counter[int]()
    for rank in range(ranks):
        cut = share.cut((sum(widths),), ranks, rank)
        assert cut.size == sum(widths) // units
        for start, stop in cut.spans:
            assert stop - start in {w // units for w in widths}
            read.update(range(start, stop))
    assert set(read) == set(range(sum(widths))) and set(read.values()) == {per if per > 1 else 1}
