"""Tests that need a GPU: a captured decode step equals its layers, and FP8 rounding in hardware."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from farthing.model.config import ModelConfig
from farthing.model.load import random_model
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing_gpu.sample import quantize
from tests.engine.conftest import RAW
from tests.gpu.parts import INTERPRETED
from tests.gpu.test_attention import moved

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")]


def test_replayed_step_equals_its_layers() -> None:
    model = random_model(ModelConfig.from_json(RAW), select("gpu", torch.float32), seed=7)
    cache = model.new_cache(8, 16, "float32")
    device = model.ops.device
    tables = [[4], [2, 1], [0]]
    prompt = moved(make_batch([3, 9, 1], [0, 0, 0], tables, 16))
    model.forward(torch.arange(13, device=device), prompt, cache)
    step = moved(make_batch([1, 1, 1], [3, 9, 1], tables, 16))
    ids = torch.tensor([7, 8, 9], device=device)
    h = model.ops.embed(ids, model.embedding)
    for i, (attention, feed_forward) in enumerate(model.layers):
        h = feed_forward(attention(h, step, cache, i))
    counts = torch.zeros(3, 4, dtype=torch.int64, device=device)
    for turn in (1, 2, 3):  # captured, then replayed
        assert torch.allclose(model.forward(ids, step, cache, counts), h, atol=1e-5)
        assert counts.sum() == turn * 3 * 2  # one layer of experts, two per token; padding is not counted
    captured = list(model.ops._graphs._captured.values())  # type: ignore[attr-defined]
    assert captured and all(c.graph is not None for c in captured)


def test_hardware_fp8_rounding_equals_torch() -> None:
    x = torch.randn(64, 512, device="cuda").bfloat16()
    q, scale = quantize(x)
    expected = (x.float() / scale.repeat_interleave(128, 1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (q.view(torch.uint8) == expected.view(torch.uint8)).float().mean() > 0.999
