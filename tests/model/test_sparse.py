"""Sparse attention in the model: dense while the context fits, one selection for layers that share it."""

from __future__ import annotations

import pytest
import torch

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.fields import ConfigError
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from tests.tiny import SMALL_V3

TINY = SMALL_V3 | dict(
    model_type="deepseek_v32",
    vocab_size=64,
    hidden_size=32,
    num_nextn_predict_layers=0,
    index_topk=16,
    index_n_heads=24,
    index_head_dim=8,
)


def logits(model: DecoderModel, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    cache, start, out = model.new_cache(16, 4, "float32"), 0, []
    with torch.inference_mode():
        for size in chunks:
            batch = make_batch([size], [start], [list(range(16))], 4)
            out.append(model.logits(model.forward(ids[start : start + size], batch, cache)))
            start += size
    return torch.cat(out)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_context_that_fits_equals_v3_attention(backend: str) -> None:
    sparse = ModelConfig.from_json(TINY)
    parameters = MemorySource(random_parameters(sparse))
    ids = torch.randint(0, 64, (40,), generator=torch.manual_seed(1))
    whole, some = (
        DecoderModel(c, select(backend, dtype=torch.float32), parameters)
        for c in (sparse.selecting(None), sparse)
    )
    chunks = [10, 5, 1, 24]
    dense, chosen = logits(whole, ids, chunks), logits(some, ids, chunks)
    assert (
        torch.equal(dense[:16], chosen[:16])
        if backend == "reference"
        else torch.allclose(dense[:16], chosen[:16], atol=1e-5)
    )
    assert not torch.allclose(dense[20:], chosen[20:], atol=1e-3)


def test_index_rows_and_types() -> None:
    glm = TINY | dict(model_type="glm_moe_dsa", num_hidden_layers=6, num_nextn_predict_layers=1)
    config = ModelConfig.from_json(glm | dict(index_topk_freq=2))
    assert [i for i in range(6) if not config.has_indexer(i)] == [2, 4]
    assert config.index_rows == 5  # four of the hidden layers, and the MTP layer's own
    assert ModelConfig.from_json(glm | dict(index_topk_pattern="FSSFSS")).index_rows == 3
    with pytest.raises(ConfigError, match=r"indexer_types\[0\]: got 'shared'"):
        ModelConfig.from_json(glm | dict(index_topk_pattern="SFFFFF"))
    with pytest.raises(ConfigError, match=r"index_topk: got 0; expected a positive integer"):
        ModelConfig.from_json(TINY | dict(index_topk=0))
    with pytest.raises(ConfigError, match=r"q_lora_rank is absent"):
        ModelConfig.from_json(TINY | dict(q_lora_rank=None))
