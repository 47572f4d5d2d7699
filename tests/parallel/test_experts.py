"""Expert placement: complete, copies on different ranks, balanced loads; same sums as without placement."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.model import ModelConfig
from farthing.model.load import random_model, random_parameters
from farthing.model.source import MemorySource
from farthing.ops import make_batch, select
from farthing.parallel import rank as rank_module
from farthing.parallel.experts import in_order, place
from farthing.parallel.group import Alone
from farthing.parallel.plan import Layout
from farthing.parallel.rank import Rank
from tests.tiny import SMALL_V3

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
def test_errors(redundant: int, message: str) -> None:
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
    from farthing.parallel import micro

    config = ModelConfig.from_json(SMALL_V3)
    model = random_model(config, select("reference"), seed=5)
    batch = make_batch([20, 3, 17], [0, 0, 0], [[0, 1, 2], [3], [4, 5, 6]], 8)
    ids = torch.arange(40) % config.vocab_size
    whole = model.forward(ids, batch, model.new_cache(8, 8, "float32"))
    cache, parts = model.new_cache(8, 8, "float32"), []
    for a, b in ((0, 7), (7, 21), (21, 22), (22, 40)):
        parts.append(model.forward(ids[a:b], micro.rows_of(batch, a, b), cache))
    torch.testing.assert_close(torch.cat(parts), whole)
    assert [rows for rows, _ in micro.micro_batches(batch, 4)] == [slice(0, 40)]  # too few rows to split
