"""The cheapest mix of variants, compared with all mixes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.fleet.variants import Variant, carries, cheapest_mix, cost, settled_mix

variants = st.lists(
    st.tuples(st.floats(0.2, 40), st.floats(0.25, 16), st.booleans(), st.integers(0, 6)),
    min_size=1,
    max_size=4,
).map(lambda rows: [Variant(f"v{i}", *row) for i, row in enumerate(rows)])


def exact(kinds: list[Variant], need: float, spot_share: float) -> float | None:
    """The least price over all mixes; None if none carries the need."""
    mixes = itertools.product(*(range(v.max_replicas + 1) for v in kinds))
    named = (dict(zip([v.name for v in kinds], counts, strict=True)) for counts in mixes)
    return min((cost(kinds, m) for m in named if carries(kinds, m, need, spot_share)), default=None)


@given(variants, st.floats(0.1, 60), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@settings(max_examples=150, deadline=None)
def test_mix_is_within_one_percent_of_the_optimum(
    kinds: list[Variant], need: float, spot_share: float
) -> None:
    best, mix = exact(kinds, need, spot_share), cheapest_mix(kinds, need, spot_share)
    if best is None:
        assert mix == {v.name: v.max_replicas for v in kinds}
        return
    assert carries(kinds, mix, need - 1e-5, spot_share)
    assert all(0 <= mix[v.name] <= v.max_replicas for v in kinds)
    assert cost(kinds, mix) <= 1.01 * best + 1e-6


def test_current_mix_is_kept_while_it_costs_little_more() -> None:
    kinds = [Variant("large", 8.0, 4.0), Variant("small", 2.1, 1.0)]
    assert cheapest_mix(kinds, 4.0) == {"large": 1, "small": 0}
    assert settled_mix(kinds, {"large": 0, "small": 4}, 4.0) == {"large": 0, "small": 4}
    assert settled_mix(kinds, {"large": 0, "small": 6}, 4.0) == {"large": 1, "small": 0}
    assert settled_mix(kinds, {"large": 0, "small": 4}, 5.0) == {"large": 1, "small": 1}


def test_invalid_variants_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"variant x.price: got 0; expected a number above 0"):
        Variant("x", 0)
    with pytest.raises(ValueError, match=r"variant x.max_replicas: got -1"):
        Variant("x", 1.0, max_replicas=-1)
