"""Optimal brain surgery on blocks against a least-squares solver that tries every block."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from farthing_lab.compress.prune import Trace, block_trace, cheapest, least_squares, saliency

DAMP = 0.01


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int, tokens: int, k: int) -> Tensor:
    return random(seed, tokens, k) @ (random(seed + 1, k, k) * torch.linspace(2, 0.1, k))


def damped(x: Tensor) -> Tensor:
    """x with rows appended so that its second moments include the damping."""
    k = x.shape[1]
    mean = x.double().square().sum() / k
    return torch.cat((x.double(), torch.eye(k, dtype=torch.float64) * (DAMP * mean) ** 0.5))


def best_on(w: Tensor, x: Tensor, columns: list[int]) -> tuple[Tensor, float]:
    """The weights with the least output error using only `columns`, and that error. w [r, K], x damped."""
    target = x @ w.double().T
    value = torch.zeros_like(w, dtype=torch.float64)
    value[:, columns] = torch.linalg.lstsq(x[:, columns], target).solution.T
    return value, float((x @ value.T - target).square().sum())


def test_the_trace_is_greedy_elimination_with_least_squares_after_every_cut() -> None:
    w, x = random(0, 2, 6, 20), torch.stack([inputs(1, 80, 20), inputs(7, 80, 20)])
    trace = block_trace(w, x.transpose(1, 2) @ x, (3, 4), most=0.8)
    assert trace.order.shape == (2, 2, 4)
    for b, s in itertools.product(range(2), range(2)):
        strip, z = w[b, 3 * s : 3 * s + 3], damped(x[b])
        gone: list[int] = []
        spent, costs = 0.0, []
        for step in range(4):
            errors = {}
            for block in set(range(5)) - set(gone):
                left = [k for k in range(20) if k // 4 not in (*gone, block)]
                errors[block] = best_on(strip, z, left)[1]
            block = min(errors, key=errors.__getitem__)
            assert int(trace.order[b, s, step]) == block
            gone.append(block)
            costs.append(errors[block] - spent)
            spent = errors[block]
        expected = torch.tensor(costs).cummax(0).values
        torch.testing.assert_close(trace.cost[b, s], expected.float(), rtol=2e-3, atol=1e-3)


def test_least_squares_equals_a_solver_on_the_kept_columns() -> None:
    w, x = random(0, 1, 8, 24), inputs(3, 100, 24)
    keep = (random(5, 4, 24) > 0).repeat_interleave(2, 0)[None]
    value = least_squares(w, (x.T @ x)[None], keep, rows=2)[0]
    for row in range(8):
        columns = keep[0, row].nonzero().flatten().tolist()
        expected = best_on(w[0, row : row + 1], damped(x), columns)[0]
        torch.testing.assert_close(value[row : row + 1].double(), expected, rtol=1e-4, atol=1e-4)
    same_rows_alone = least_squares(w, (x.T @ x)[None], keep, rows=1)[0]
    torch.testing.assert_close(value, same_rows_alone, rtol=1e-4, atol=1e-5)


def test_saliency_is_the_cost_of_cutting_one_weight() -> None:
    w, x = random(0, 1, 3, 12), inputs(2, 60, 12)
    score = saliency(w, (x.T @ x)[None])[0]
    for row, column in itertools.product(range(3), range(12)):
        left = [k for k in range(12) if k != column]
        cost = best_on(w[0, row : row + 1], damped(x), left)[1]
        assert float(score[row, column]) == pytest.approx(cost, rel=1e-3)


def test_costs_select_better_blocks_than_energy_and_compensation_helps() -> None:
    from farthing.compress.quantize import Feedback, output_error, sweep
    from farthing_lab.compress.masks import mask, scores

    w, x = random(0, 1, 64, 64), inputs(9, 400, 64)
    gram = (x.T @ x)[None]
    trace = block_trace(w, gram, (16, 16), 0.9)
    keep = trace.keep(cheapest([trace], 5)[0], (16, 16), 64)
    by_energy = mask(scores(w[0], gram[0].diagonal() / 400, "energy"), 5 / 16, "16x16")[None]
    assert int((~keep).sum()) == int((~by_energy).sum()) == 5 * 256
    ours = output_error(w, least_squares(w, gram, keep, 16), gram)
    assert float(ours) < 0.8 * float(output_error(w, sweep(w, Feedback.of(gram), keep=by_energy)[0], gram))
    assert float(ours) < float(output_error(w, sweep(w, Feedback.of(gram), keep=keep)[0], gram))
    assert float(ours) < 0.5 * float(output_error(w, w * keep, gram))


def test_one_threshold_prunes_the_requested_number_of_blocks() -> None:
    traces = [
        Trace(torch.arange(4).expand(2, 3, 4), random(i, 2, 3, 4).abs().cummax(2).values) for i in range(2)
    ]
    counts = cheapest(traces, 17)
    assert sum(int(c.sum()) for c in counts) == 17
    kept = [t.cost[..., None][torch.arange(4) >= c[..., None]] for t, c in zip(traces, counts, strict=True)]
    cut = [t.cost[..., None][torch.arange(4) < c[..., None]] for t, c in zip(traces, counts, strict=True)]
    assert max(float(c.max()) for c in cut) <= min(float(k.min()) for k in kept)
    assert not any(c.any() for c in cheapest(traces, 0))
    with pytest.raises(ValueError, match="expected at most"):
        cheapest(traces, 49)


def test_blocks_must_tile() -> None:
    with pytest.raises(ValueError, match="do not tile"):
        block_trace(torch.zeros(1, 8, 20), torch.zeros(1, 20, 20), (16, 16), 0.5)
