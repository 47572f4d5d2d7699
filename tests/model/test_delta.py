"""Layers of Gated DeltaNet next to gated attention, on every backend: a small Qwen3-Next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing.model.config import ConfigError, ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.kinds import cache_kinds
from farthing.model.load import random_model
from farthing.ops.api import CacheDtype
from farthing.ops.cpu.backend import CpuOps
from farthing.ops.hybrid import HybridOps
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from tests.isas import ISAS
from tests.tiny import QWEN3_NEXT

from .steps import distance, logits_of

CONFIG = ModelConfig.from_json(QWEN3_NEXT)


def built(backend: str = "cpu", **options: Any) -> DecoderModel:
    threads = None if backend == "reference" else options.pop("threads", 1)
    return random_model(CONFIG, select(backend, torch.float32, threads, **options), seed=7)


def logits(model: DecoderModel, dtype: CacheDtype = "float32", length: int = 40) -> torch.Tensor:
    return logits_of(model, torch.arange(length) % CONFIG.vocab_size, dtype)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return logits(built("reference"))


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_agree_with_the_reference(isa: str, expected: torch.Tensor) -> None:
    assert distance(logits(random_model(CONFIG, CpuOps(2, isa=isa), seed=7)), expected) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int8"])
def test_rounded_caches_agree_with_the_reference(dtype: CacheDtype) -> None:
    assert distance(logits(built(), dtype), logits(built("reference"), dtype)) < 0.02


@pytest.mark.parametrize("backend", ["torch", "gpu"])
def test_other_backends_agree_with_the_reference(backend: str, expected: torch.Tensor) -> None:
    if backend == "gpu":
        pytest.importorskip("triton")
        from farthing_gpu import GpuOps

        model = random_model(CONFIG, GpuOps(torch.float32, torch.device("cpu")), seed=7)
        expected = logits(built("reference"), length=12)
        assert distance(logits(model, length=12), expected) < 1e-5
        return
    assert distance(logits(built(backend)), expected) < 1e-5


def test_experts_on_the_host_give_the_same_logits(expected: torch.Tensor) -> None:
    ops = HybridOps(select("torch", torch.float32), select("cpu", threads=1), 2)
    assert distance(logits(random_model(CONFIG, ops, seed=7)), expected) < 1e-5


def test_long_prompts_take_expanded_attention_with_the_same_result() -> None:
    found = [logits(random_model(CONFIG, CpuOps(2, invariant=e), seed=7), length=1400) for e in (False, True)]
    assert not torch.equal(*found)
    assert distance(*found) < 1e-5


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_packed_file_gives_the_same_logits(quantization: str | None, tmp_path: Path) -> None:
    path = str(tmp_path / "packed.bin")
    model = built(quantization=quantization)
    model.ops.save_packed(path)
    mapped = built(packed=path)
    assert mapped.ops.packed_from is not None
    assert torch.equal(logits(model), logits(mapped))
    assert distance(logits(model), logits(built())) < {None: 1e-6, "int8": 0.1, "int4": 0.6}[quantization]


def test_layers_run_in_one_call_or_divided_with_the_same_bits() -> None:
    model = built()
    assert model.stack is not None
    whole = logits(model)
    ids, batch = torch.arange(20), make_batch([20], [0], [[2, 0, 1]], 8)
    h, cache = model.embed(ids), model.new_cache(3, 8)
    for layer in range(CONFIG.num_hidden_layers):
        h = model.run_layers(h, batch, cache, span=slice(layer, layer + 1))
    assert torch.equal(h, model.forward(ids, batch, model.new_cache(3, 8)))
    model.unstack()
    assert torch.equal(logits(model), whole)


def test_attention_layers_alone_have_cache_rows() -> None:
    cache = built().new_cache(5, 8)
    assert cache.state is not None
    assert cache.data.shape[:2] == (2, 5)  # one layer of two key-value heads
    assert cache.state.data.shape == (2, 5, 4, 16, 16)
    *_, states = cache_kinds(CONFIG)
    assert states.layers == (0, 2)
    assert states.state_bytes == 2 * 4 * (4 * 16 * 16 + 3 * 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(linear_num_value_heads=3), "linear_num_value_heads: got 3; expected a multiple of"),
        (dict(linear_conv_kernel_dim=9), "linear_conv_kernel_dim: got 9"),
        (dict(linear_key_head_dim=0), "linear_key_head_dim: got 0"),
        (dict(layer_types=["linear_attention"]), "layer_types has 1 entries"),
        (dict(layer_types=["mamba"] * 3), "layer_types: got"),
        (dict(shared_expert_intermediate_size=0), "shared_expert_intermediate_size: got 0"),
    ],
)
def test_broken_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(QWEN3_NEXT | changes)
