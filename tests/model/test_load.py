"""Adaptive experts: parsing of the rule, and its routing against manual counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farthing.model.config import ModelConfig
from farthing.model.fields import ConfigError
from farthing.model.load import AdaptiveExperts, random_model
from farthing.ops.reference import route
from farthing.ops.select import select
from farthing.ops.specs import RouterSpec
from farthing.ops.torch_util import make_batch
from tests.tiny import SMALL_V3


def test_parse() -> None:
    assert AdaptiveExperts.parse("all") is None
    assert AdaptiveExperts.parse("adaptive:0.9") == AdaptiveExperts((0.9,), 2, None)
    assert AdaptiveExperts.parse("adaptive:0.8,min=1,max=6") == AdaptiveExperts((0.8,), 1, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some", "experts: got 'some'; expected 'auto', 'all' or"),
        ("adaptive:", "experts: got 'adaptive:'"),
        ("adaptive:1.5", "p: got 1.5; expected 0 < p <= 1"),
        ("adaptive:0.5,mini=2", "option 'mini' is unknown"),
        ("adaptive:0.5,min=0", "min: got 0; expected at least 1"),
        ("adaptive:0.5,min=4,max=3", "max: got 3; expected at least min = 4"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptiveExperts.parse(text)


@given(
    seed=st.integers(0, 2**31), mass=st.floats(0.05, 1.0), least=st.integers(1, 8), normalize=st.booleans()
)
def test_fewest_experts_that_reach_the_mass(seed: int, mass: float, least: int, normalize: bool) -> None:
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) * 3
    spec = RouterSpec(16, 8, normalize=normalize, scale=2.0)
    _, full = route(logits, None, spec)
    adaptive = RouterSpec(16, 8, normalize=normalize, scale=2.0, mass=mass, min_experts=least)
    ids, weights = route(logits, None, adaptive)
    for t in range(5):
        share = (full[t] / full[t].sum()).sort(descending=True).values.double()
        needed = next((n for n in range(1, 9) if share[:n].sum() >= mass - 1e-6), 8)
        kept = int((ids[t] >= 0).sum())
        # Float rounding may decide a share that meets the mass exactly either way.
        assert kept in {
            max(needed, least),
            max(needed + 1, least) if share[:needed].sum() < mass + 1e-6 else 0,
        }
        assert weights[t][ids[t] < 0].abs().sum() == 0
        if normalize:
            assert float(weights[t].sum()) == pytest.approx(2.0, rel=1e-5)


def test_full_mass_changes_nothing_and_less_mass_costs_less() -> None:
    config = ModelConfig.from_json(SMALL_V3 | dict(num_experts_per_tok=4, topk_group=2))
    ops = select("reference")
    batch, ids = make_batch([12], [0], [[0]], 16), torch.arange(12)

    def run(rule: AdaptiveExperts | None) -> tuple[torch.Tensor, int]:
        model = random_model(config, ops, seed=1, routers=rule.routers(config) if rule else None)
        counts = torch.zeros(model.cache_layers, 8, dtype=torch.int64)
        return model.forward(ids, batch, model.new_cache(1), counts), int(counts.sum())

    plain, all_experts = run(None)
    whole, same = run(AdaptiveExperts((1.0,)))
    torch.testing.assert_close(whole, plain, rtol=1e-5, atol=1e-5)
    assert (all_experts, same) == (12 * 2 * 4, 12 * 2 * 4)
    assert run(AdaptiveExperts((0.5,), 2))[1] < all_experts
    assert run(AdaptiveExperts((0.01,), 2))[1] == 12 * 2 * 2
    assert run(AdaptiveExperts((1.0,), 2, 3))[1] == 12 * 2 * 3


def test_round_trip_through_config_json() -> None:
    config = ModelConfig.from_json(SMALL_V3)
    rule = AdaptiveExperts((0.5, 0.6, 0.7, 0.8), 1, 2)
    assert AdaptiveExperts.from_json(rule.to_json(config)) == rule
    assert AdaptiveExperts.from_json({}) is None
    with pytest.raises(ConfigError, match="expected 1 or one for each of 4 layers"):
        AdaptiveExperts((0.5, 0.6)).routers(config)
    with pytest.raises(ConfigError, match="adaptive_experts: got"):
        AdaptiveExperts.from_json({"adaptive_experts": {"mass": 3}})


@pytest.mark.parametrize(
    ("rule", "leaves_out"),
    [((0.6,), True), ((1.0,), False), ((1.0, 0.9), True)],
)
def test_a_rule_leaves_experts_out_if_it_may_have_fewer_than_most(
    rule: tuple[float, ...], leaves_out: bool
) -> None:
    assert AdaptiveExperts(rule, 2, 8).leaves_out is leaves_out
    assert AdaptiveExperts(rule, 2).leaves_out is leaves_out
    assert not AdaptiveExperts(rule, 2, 2).leaves_out
