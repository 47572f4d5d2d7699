"""Masks, schedules, neurons, experts and the knapsack against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.compress.plan import one_per_part
from farthing.compress.sensitivity import Option
from farthing.compress.size import Sizes
from farthing_lab.compress.masks import BLOCKS, block_scores, cubic_sparsity, global_budgets, mask, scores
from farthing_lab.compress.prune import (
    choose_experts,
    choose_neurons,
    kept_neurons,
    neuron_scores,
    plan_experts,
    slice_mlp,
)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scores_match_the_papers() -> None:
    w, x = random(0, 6, 10), random(1, 50, 10)
    energy = x.square().mean(0)
    assert torch.equal(scores(w, None, "magnitude"), w.abs())
    torch.testing.assert_close(scores(w, energy, "wanda"), w.abs() * x.norm(dim=0) / 50**0.5)
    # the energy a single weight's output loses: mean over tokens of (w x)^2
    expected = (w.unsqueeze(0) * x.unsqueeze(1)).square().mean(0)
    torch.testing.assert_close(scores(w, energy, "energy"), expected)
    with pytest.raises(ValueError, match="needs calibration data"):
        scores(w, None, "wanda")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.floats(0, 0.95),
    st.sampled_from(sorted(BLOCKS)),
    st.integers(0, 99),
)
def test_requested_number_of_whole_blocks_is_pruned(
    n: int, k: int, sparsity: float, pattern: str, seed: int
) -> None:
    score = random(seed, n, k).abs()
    keep = mask(score, sparsity, pattern)  # type: ignore[arg-type]
    r, c = BLOCKS[pattern]
    kept, dropped = [], []
    for i in range(0, n, r):
        for j in range(0, k, c):
            block, s = keep[i : i + r, j : j + c], score[i : i + r, j : j + c]
            assert bool(block.all()) or not bool(block.any())
            (kept if bool(block.all()) else dropped).append(float(s.mean()))
    assert len(dropped) == round(sparsity * (len(kept) + len(dropped)))
    if kept and dropped:
        assert max(dropped) <= min(kept) * (1 + 1e-5) + 1e-9


def test_wanda_compares_within_rows_and_magnitude_across_rows() -> None:
    w = torch.stack([torch.linspace(1, 2, 10), torch.linspace(100, 200, 10)])
    assert mask(w, 0.3, per_row=True).sum(1).tolist() == [7, 7]
    assert mask(w, 0.5).sum(1).tolist() == [0, 10]


def test_two_of_four_keeps_the_two_best() -> None:
    score = random(0, 5, 24).abs()
    keep = mask(score, 0.5, "2:4").view(5, 6, 4)
    for row, group in itertools.product(range(5), range(6)):
        best = set(score.view(5, 6, 4)[row, group].topk(2).indices.tolist())
        assert {i for i in range(4) if keep[row, group, i]} == best
    with pytest.raises(ValueError, match="multiple of 4"):
        mask(torch.ones(2, 6), 0.5, "2:4")


def test_one_threshold_over_all_matrices() -> None:
    pieces = {"a": torch.arange(10.0), "b": torch.arange(10.0) + 5, "c": torch.full((20,), 100.0)}
    budgets = global_budgets(pieces, 0.25)
    dropped = sum(budgets[n] * pieces[n].numel() for n in pieces)
    assert dropped == pytest.approx(10, abs=1) and budgets["a"] > budgets["b"] > budgets["c"] == 0
    assert global_budgets({"a": torch.zeros(9), "b": torch.ones(1)}, 0.9)["a"] == 0.9


@pytest.mark.parametrize("bad", [-0.1, 1.0, 2.0])
def test_bad_sparsity(bad: float) -> None:
    with pytest.raises(ValueError, match="expected a share"):
        mask(torch.ones(4, 4), bad)


def test_ragged_blocks_compare_by_their_mean() -> None:
    sums = block_scores(torch.ones(20, 5), (16, 4))
    assert torch.equal(sums, torch.full((2, 2), 64.0))


def test_cubic_schedule() -> None:
    assert cubic_sparsity(0, 10, 110, 0.8) == 0 and cubic_sparsity(500, 10, 110, 0.8) == 0.8
    assert cubic_sparsity(60, 10, 110, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    values = [cubic_sparsity(s, 0, 100, 0.5, 0.1) for s in range(101)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert values[0] == pytest.approx(0.1) and all(a >= b >= 0 for a, b in itertools.pairwise(steps))
    with pytest.raises(ValueError, match="expected a step after"):
        cubic_sparsity(1, 5, 5, 0.5)


def test_neurons_by_the_energy_they_add() -> None:
    x, gate, up, down = random(0, 200, 8), random(1, 12, 8), random(2, 12, 8), random(3, 6, 12)
    act = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    score = neuron_scores(down, act.square().mean(0))
    for i in range(12):
        lone = act[:, i : i + 1] @ down[:, i : i + 1].T
        assert float(score[i]) == pytest.approx(float(lone.square().sum(1).mean()), rel=1e-4)
    keep = choose_neurons(score, 9)
    assert set(range(12)) - set(keep) == set(score.argsort()[:3].tolist())
    g, u, d = slice_mlp(gate, up, down, keep)
    expected = act[:, keep] @ down[:, keep].T
    torch.testing.assert_close((torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T, expected)
    assert kept_neurons(1024, 0.3) == 720 and kept_neurons(8, 0.5) == 8


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.floats(0, 0.99), st.integers(0, 99))
def test_top_k_stays_reachable(groups: int, size: int, top_k: int, share: float, seed: int) -> None:
    topk_groups = max(1, groups // 2)
    if topk_groups * size < top_k or (groups > 1 and size < 2):
        return
    try:
        plan = plan_experts(groups * size, share, groups, topk_groups, top_k)
    except ValueError as error:
        assert "expected at most" in str(error)
        return
    assert plan.per_group * topk_groups >= top_k and 1 <= plan.kept <= groups * size
    saliency = random(seed, groups * size).abs()
    tokens = torch.randint(0, 5, (groups * size,), generator=torch.Generator().manual_seed(seed))
    kept = choose_experts(saliency, tokens, plan)
    assert kept == sorted(set(kept)) and len(kept) == plan.kept
    for g in range(groups):
        assert sum(g * size <= e < (g + 1) * size for e in kept) == plan.per_group


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_knapsack_is_nearly_optimal(parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"p{i}" for i in range(parts)]
    options = []
    for name in names:
        size = int(torch.randint(1000, 5000, (1,), generator=generator))
        loss = float(torch.rand(1, generator=generator)) + 0.01
        for kind, n, kl in (("int4", size // 2, loss), ("int8", size, loss / 20), ("keep", 2 * size, 0.0)):
            options.append(Option(name, kind, Sizes(n, n, n), kl))
    by_part = [[o for o in options if o.part == n] for n in names]
    limit = 1.1 * sum(o[1].sizes.memory for o in by_part)

    def size_of(option: Option) -> float:
        return option.sizes.memory

    chosen = one_per_part(options, names, size_of, lambda o: o.kl, limit)
    assert sum(map(size_of, chosen.values())) <= limit
    # sizes are rounded up to 1/2000 of the budget, so a budget smaller by that much bounds the optimum
    tight = limit * (1 - parts / 2000)
    best = min(
        sum(o.kl for o in plan) for plan in itertools.product(*by_part) if sum(map(size_of, plan)) <= tight
    )
    assert sum(o.kl for o in chosen.values()) <= best + 1e-9
    smallest = sum(o[0].sizes.memory for o in by_part)  # fits exactly despite the rounding to cells
    tightest = one_per_part(options, names, size_of, lambda o: o.kl, smallest)
    assert {o.format for o in tightest.values()} == {"int4"}
    with pytest.raises(ValueError, match="the limit is 10; expected at least"):
        one_per_part(options, names, size_of, lambda o: o.kl, 10)
