"""All layers in one native call, bitwise equal to the loop over layers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import random_model
from farthing.ops.api import CacheDtype
from farthing.ops.cpu import CpuOps
from farthing.ops.torch_util import make_batch
from tests.tiny import tiny

pytestmark = pytest.mark.usefixtures("exact_on_amx")

CONFIG = tiny(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=7,  # queries together are wider than what they are projected from
    q_lora_rank=40,
    kv_lora_rank=32,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=3,
)


def forward(model: DecoderModel, cache_dtype: CacheDtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states of a prompt's two parts and of a token after them; tokens seen by each expert."""
    cache = model.new_cache(8, 16, cache_dtype)
    counts = torch.zeros(3, 8, dtype=torch.int64)
    out, done = [], 0
    for new in (37, 5, 1):
        ids = torch.arange(done, done + new) * 7 % 300
        batch = make_batch([new], [done], [range(8)], 16)
        out.append(model.forward(ids, batch, cache, counts))
        done += new
    return [*out, model.forward(ids, batch, cache)], counts


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("q_lora_rank", [40, None])
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_stack_equals_the_loop(
    cache_dtype: CacheDtype, q_lora_rank: int | None, quantization: str | None
) -> None:
    config = ModelConfig.from_json(CONFIG | {"q_lora_rank": q_lora_rank})
    model = random_model(config, CpuOps(2, quantization))
    assert model.stack is not None
    stacked, counts = forward(model, cache_dtype)
    model.stack = None
    looped, expected = forward(model, cache_dtype)
    assert torch.equal(counts, expected) and int(counts.sum()) == 2 * 3 * 43
    for a, b in zip(stacked, looped, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_mtp_stack_equals_its_loop(cache_dtype: CacheDtype) -> None:
    config = ModelConfig.from_json(CONFIG | {"num_nextn_predict_layers": 1})
    model = random_model(config, CpuOps(2))
    ids = torch.arange(20) * 7 % 300
    batch, found = make_batch([19], [0], [range(8)], 16), []
    assert model.mtp[0].stack is not None
    for _ in range(2):
        cache, counts = model.new_cache(8, 16, cache_dtype), torch.zeros(4, 8, dtype=torch.int64)
        hidden = model.forward(ids[:-1], batch, cache)
        found.append((model.draft(ids[1:], hidden, batch, cache, counts=counts), counts, cache.data.clone()))
        model.mtp[0].stack = None
    for stacked, looped in zip(*found, strict=True):
        assert torch.equal(stacked, looped)
    assert int(found[0][1][3].sum()) == 3 * 19 and int(found[0][1][:3].sum()) == 0
