"""The whole engine on the GPU backend generates the reference's greedy tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from farthing.config import EngineConfig
from farthing.engine.engine import Engine
from farthing.engine.request import SamplingParams
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import random_model
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing_gpu import GpuOps
from tests.engine.conftest import RAW
from tests.gpu.parts import DEVICE
from tests.gpu.test_attention import moved
from tests.ops.parts import distance

PROMPTS = [[3, 5, 7, 11, 13], [2] * 18, [101]]


def tiny(backend: str, **changed: Any) -> DecoderModel:
    config = ModelConfig.from_json(RAW | changed)
    return random_model(config, select(backend, torch.float32), seed=7)


def tokens(model: DecoderModel, params: list[SamplingParams], **config: Any) -> list[list[int]]:
    engine = Engine(model, EngineConfig(max_num_seqs=4, num_blocks=16, block_size=16, **config))
    try:
        streams = [engine.submit(p, s, kind="final") for p, s in zip(PROMPTS, params, strict=True)]
        return [list(s.result().outputs[0].token_ids) for s in streams]
    finally:
        engine.shutdown()


def greedy(model: DecoderModel, count: int = 4, **config: Any) -> list[list[int]]:
    return tokens(model, 3 * [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)], **config)


def test_greedy_tokens_equal_the_reference() -> None:
    expected = greedy(tiny("reference"))
    model = tiny("gpu")
    assert greedy(model) == expected
    assert len(model.ops._graphs) > 0  # type: ignore[attr-defined]


def test_seeded_tokens_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine samples with the backend's kernels, not in torch."""
    kinds: list[bool] = []
    kernels = GpuOps.sample

    def spy(self: GpuOps, logits: torch.Tensor, uniform: torch.Tensor, filters: Any = None) -> torch.Tensor:
        kinds.append(filters is None)
        return kernels(self, logits, uniform, filters)

    monkeypatch.setattr(GpuOps, "sample", spy)
    fixed: dict[str, Any] = dict(max_tokens=4, ignore_eos=True)
    params = [
        SamplingParams(seed=1, **fixed),
        SamplingParams(seed=2, temperature=0.7, top_p=0.9, top_k=20, **fixed),
        SamplingParams(seed=3, temperature=1.3, min_p=0.01, **fixed),
    ]
    expected = tokens(tiny("reference"), params)
    assert not kinds and len({tuple(t) for t in expected}) == 3
    assert tokens(tiny("gpu"), params) == expected
    assert set(kinds) == {True, False}


@pytest.mark.slow
def test_mtp_layer_drafts_on_the_backend() -> None:
    assert greedy(tiny("gpu"), speculate="mtp:1", count=3) == greedy(tiny("reference"), count=3)


def test_counts_and_hidden_states_of_a_padded_step() -> None:
    shapes = {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}
    results = []
    for backend in ("reference", "gpu"):
        model = tiny(backend, **shapes)
        cache = model.new_cache(8, 16, "float32")
        device = model.ops.device
        counts = torch.zeros(3, 6, dtype=torch.int64, device=device)
        h = []
        for new, cached in (([3, 9, 1], [0, 0, 0]), ([1, 1, 1], [3, 9, 1])):
            batch = make_batch(new, cached, [[4], [2, 1], [0]], 16)
            batch = moved(batch) if DEVICE.type == "cuda" and backend == "gpu" else batch
            ids = torch.arange(sum(new), device=device)
            h.append(model.forward(ids, batch, cache, counts).cpu())
        results.append((counts.cpu(), torch.cat(h)))
    assert torch.equal(results[0][0], results[1][0])
    assert distance(results[0][1], results[1][1]) < 1e-9
