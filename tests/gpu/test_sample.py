"""The kernels draw the tokens of the reference and of the engine; frequencies follow the distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from typing import Any

from farthing.engine.request import SamplingParams
from farthing.engine.sampler import Row, SamplingState, _filters, sample_logits, uniform
from farthing.ops import sampling as reference
from farthing.ops.select import select
from farthing_gpu import sample as kernels
from farthing_gpu.sample import sample_filtered, sample_tokens
from tests.gpu.parts import DEVICE


def uniforms(rows: int) -> Tensor:
    return torch.tensor([uniform(11, i) for i in range(rows)], dtype=torch.float64)


@pytest.mark.parametrize("vocabulary", [5, 129, 5000])
def test_over_the_vocabulary(vocabulary: int) -> None:
    logits, u = torch.randn(7, vocabulary) * 3, uniforms(7)
    logits[0, 1:] = float("-inf")
    assert torch.equal(sample_tokens(logits.to(DEVICE), u.to(DEVICE)).cpu(), reference.sample(logits, u))


def test_the_ends_of_the_distribution() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).repeat(2, 1)
    u = torch.tensor([1e-16, 1 - 1e-16], dtype=torch.float64)
    assert sample_tokens(logits.to(DEVICE), u.to(DEVICE)).tolist() == [1, 2]


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
    tokens = sample_filtered(logits.to(DEVICE), u.to(DEVICE), _filters(PARAMS, logits.to(DEVICE)))
    assert torch.equal(tokens.cpu(), reference.sample(logits, u, _filters(PARAMS, logits)))


def test_wide_filters_use_the_whole_vocabulary() -> None:
    """More than the first candidates survive: the narrow search must detect it, per row."""
    wide = 2 * reference.CANDIDATES
    params, u = [SamplingParams(top_k=2), SamplingParams(top_p=0.99)], torch.tensor([0.9, 0.9]).double()
    logits = torch.randn(2, wide) / 100
    tokens = sample_filtered(logits.to(DEVICE), u.to(DEVICE), _filters(params, logits.to(DEVICE))).cpu()
    assert torch.equal(tokens, reference.sample(logits, u, _filters(params, logits)))
    assert (logits[1] > logits[1, tokens[1]]).sum() > reference.CANDIDATES


def test_engine_samples_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one step: greedy, free, filtered, at several temperatures. One launch per kind of row."""
    calls: list[str] = []
    for name in ("sample_tokens", "sample_filtered"):

        def spy(*arguments: Any, kernel: Any = getattr(kernels, name), name: str = name) -> Tensor:
            calls.append(name)
            return kernel(*arguments)  # type: ignore[no-any-return]

        monkeypatch.setattr(f"farthing_gpu.backend.{name}", spy)
    settings: list[dict[str, Any]] = [dict(temperature=0), dict(), dict(temperature=0.4), dict(temperature=2)]
    settings += [dict(top_k=3), dict(top_p=0.6, temperature=1.5), dict(min_p=0.1), dict(temperature=0)]
    rows = [Row(SamplingState(SamplingParams(**s), seed)) for seed, s in enumerate(3 * settings)]
    logits = torch.randn(len(rows), 300) * 2
    expected = sample_logits(logits, rows)
    ops = select("gpu", torch.float32)
    assert sample_logits(logits.to(DEVICE), rows, ops.sample) == expected
    assert calls == ["sample_tokens", "sample_filtered"]
    alone = [sample_logits(logits[i : i + 1].to(DEVICE), rows[i : i + 1], ops.sample) for i in range(5)]
    assert [t for tokens in alone for t in tokens] == expected[:5]  # independent of other rows


def test_frequencies() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    rows = 100
    tokens = sample_tokens(p.log().repeat(rows, 1).to(DEVICE), uniforms(rows).to(DEVICE)).cpu()
    share = torch.bincount(tokens, minlength=4) / rows
    assert (share - p).abs().max() < 3 * (0.25 / rows) ** 0.5
