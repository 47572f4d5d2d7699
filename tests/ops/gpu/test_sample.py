"""The kernels draw the engine's tokens; frequencies follow the distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from farthing.engine.request import SamplingParams
from farthing.engine.sampler import _draw_all, _draw_filtered, uniform
from farthing.ops.gpu.sample import draw, draw_filtered
from tests.ops.gpu.parts import DEVICE


def uniforms(rows: int) -> Tensor:
    return torch.tensor([uniform(11, i) for i in range(rows)], dtype=torch.float64)


@pytest.mark.parametrize("vocabulary", [5, 129, 5000])
def test_over_the_vocabulary(vocabulary: int) -> None:
    logits, u = torch.randn(7, vocabulary) * 3, uniforms(7)
    logits[0, 1:] = float("-inf")
    assert torch.equal(draw(logits.to(DEVICE), u.to(DEVICE)).cpu(), _draw_all(logits, u, []))


def test_the_ends_of_the_distribution() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).repeat(2, 1)
    u = torch.tensor([1e-16, 1 - 1e-16], dtype=torch.float64)
    assert draw(logits.to(DEVICE), u.to(DEVICE)).tolist() == [1, 2]


PARAMS = [
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.7),
    SamplingParams(min_p=0.05),
    SamplingParams(top_k=40, top_p=0.5, min_p=0.01),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.9999),
    SamplingParams(min_p=1e-9),
]


@pytest.mark.parametrize("vocabulary", [12, 700])
@pytest.mark.parametrize("heat", [0.3, 3.0])
def test_filtered(vocabulary: int, heat: float) -> None:
    logits, u = torch.randn(len(PARAMS), vocabulary) / heat, uniforms(len(PARAMS))
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocabulary for p in PARAMS])
    top_p = torch.tensor([p.top_p for p in PARAMS])
    min_p = torch.tensor([p.min_p for p in PARAMS])
    tokens = draw_filtered(*(t.to(DEVICE) for t in (logits, u, top_k, top_p, min_p)), candidates=64)
    assert torch.equal(tokens.cpu(), _draw_filtered(logits, u, PARAMS))


def test_frequencies() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    rows = 100
    tokens = draw(p.log().repeat(rows, 1).to(DEVICE), uniforms(rows).to(DEVICE)).cpu()
    share = torch.bincount(tokens, minlength=4) / rows
    assert (share - p).abs().max() < 3 * (0.25 / rows) ** 0.5
