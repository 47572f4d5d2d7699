"""Scaling and rotation: AWQ, SmoothQuant and Hadamard matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from farthing.compress.quantize import even_grid
from farthing_lab.compress.rotate import hadamard, random_hadamard, rotate_latent, rotate_values
from farthing_lab.compress.smooth import awq_scale, smooth_scale
from tests.compress.test_quantize import correlated, random


def test_awq_equals_the_grid_search_of_its_paper() -> None:
    x = correlated(0, 200, 64)
    x[:, 3] *= 30
    weights, magnitude = [random(5, 16, 64), random(6, 24, 64)], x.abs().mean(0)

    def round_to(w: Tensor, gram: Tensor) -> Tensor:
        return even_grid(w[None], 32).round(w[None])[0]

    best = awq_scale(weights, [x.T @ x] * 2, magnitude, round_to)
    size = torch.cat([w.abs() / w.abs().max(dim=1, keepdim=True).values for w in weights]).mean(0)
    errors = {}
    for i, duo in itertools.product(range(11), (False, True)):
        trial = magnitude ** (i / 10) / ((size ** (1 - i / 10) + 1e-4) if duo else 1)
        trial = trial / (trial.max() * trial.min()).sqrt()
        errors[i / 10, duo] = sum(
            float(((x / trial) @ round_to(w * trial, x.T @ x).T - x @ w.T).square().sum()) for w in weights
        )
    assert errors[best.alpha, best.duo] == pytest.approx(min(errors.values()), rel=1e-3)
    assert errors[best.alpha, best.duo] < errors[0.0, False]
    assert best.error == pytest.approx(min(errors.values()) / errors[0.0, False], rel=1e-2)
    s = best.factor
    torch.testing.assert_close((x / s) @ (weights[0] * s).T, x @ weights[0].T, rtol=1e-3, atol=1e-2)


def test_awq_rounds_with_the_moments_of_the_scaled_inputs() -> None:
    w, x = random(0, 8, 32), correlated(1, 100, 32)
    gram, seen = x.T @ x, []

    def record(scaled: Tensor, moments: Tensor) -> Tensor:
        seen.append(moments.allclose((x * w[0] / scaled[0]).T @ (x * w[0] / scaled[0]), rtol=1e-3))
        return scaled

    awq_scale([w], [gram], x.abs().mean(0), record)
    assert all(seen)


def test_smoothquant_equals_equation_4() -> None:
    weights, absmax = [random(0, 8, 16), random(1, 4, 16)], random(2, 16).abs() + 0.1
    s = smooth_scale(weights, absmax, 0.5)
    column = torch.cat(weights).abs().amax(0)
    torch.testing.assert_close(s, (absmax / column).sqrt())
    balanced = (absmax / s) / (column * s)  # at alpha 1/2 both sides end up with the same maximum
    torch.testing.assert_close(balanced, torch.ones(16))


@pytest.mark.parametrize("n", [1, 2, 12, 64, 96])
def test_hadamard_is_orthogonal(n: int) -> None:
    for h in (hadamard(n), random_hadamard(n, 3)):
        torch.testing.assert_close(h @ h.T, torch.eye(n))
        values = h[h != 0].abs()
        torch.testing.assert_close(values, values[0].expand(len(values)))


def test_rotations_preserve_the_function_and_flatten_an_outlier() -> None:
    x, producer, consumer, norm = random(0, 9, 20), random(1, 64, 20), random(2, 30, 64), random(3, 64).abs()
    producer[5] *= 50

    def run(p: Tensor, g: Tensor, c: Tensor) -> Tensor:
        latent = x @ p.T
        return (latent / latent.square().mean(-1, keepdim=True).sqrt() * g) @ c.T

    rotated = rotate_latent(producer, norm, consumer, random_hadamard(64, 0))
    torch.testing.assert_close(run(*rotated), run(producer, norm, consumer), rtol=1e-3, atol=1e-3)
    peak = [(t.abs().amax() / t.square().mean().sqrt()) for t in (x @ producer.T, x @ rotated[0].T)]
    assert float(peak[1]) < 0.5 * float(peak[0])
    kv_b, o = random(4, 2 * (3 + 4), 10), random(5, 6, 2 * 4)
    kv_b2, o2 = rotate_values(kv_b, o, heads=2, nope=3, value=4, rotation=random_hadamard(4, 1))

    def values(kv: Tensor, out: Tensor) -> Tensor:
        v = (kv.view(2, 7, 10)[:, 3:] @ random(6, 10)).flatten()
        return out @ v

    torch.testing.assert_close(values(kv_b2, o2), values(kv_b, o), rtol=1e-4, atol=1e-4)
    assert torch.equal(kv_b2.view(2, 7, 10)[:, :3], kv_b.view(2, 7, 10)[:, :3])
