"""The MTP layer against a direct implementation of DeepSeek-V3 section 2.2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from tests.tiny import tiny

RAW = tiny(
    vocab_size=50,
    hidden_size=24,
    q_lora_rank=None,
    kv_lora_rank=12,
    v_head_dim=6,
    n_routed_experts=None,
    first_k_dense_replace=2,
    num_nextn_predict_layers=1,
)


def norm(x: Tensor, w: Tensor) -> Tensor:
    return w * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def expected_hidden(p: dict[str, Tensor], h: Tensor, next_ids: Tensor) -> Tensor:
    """h'_i with a dense feed-forward, computed per head and position."""
    w = {
        k.removeprefix("model.layers.2.").removesuffix(".weight"): v
        for k, v in p.items()
        if ".layers.2." in k
    }
    embedded = p["model.embed_tokens.weight"][next_ids]
    x = torch.cat((norm(embedded, w["enorm"]), norm(h, w["hnorm"])), -1) @ w["eh_proj"].T
    n = norm(x, w["input_layernorm"])
    q = (n @ w["self_attn.q_proj"].T).view(-1, 2, 12)
    kv = n @ w["self_attn.kv_a_proj_with_mqa"].T
    expanded = norm(kv[:, :12], w["self_attn.kv_a_layernorm"]) @ w["self_attn.kv_b_proj"].T
    expanded = expanded.view(-1, 2, 14)

    def turn(v: Tensor, t: int) -> Tensor:
        out = v.clone()
        for i in range(2):
            angle = t * 10000.0 ** (-2 * i / 4)
            a, b = v[2 * i], v[2 * i + 1]
            out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    rows = []
    for t in range(len(x)):
        heads = []
        for a in range(2):
            query = torch.cat((q[t, a, :8], turn(q[t, a, 8:], t)))
            keys = [torch.cat((expanded[s, a, :8], turn(kv[s, 12:], s))) for s in range(t + 1)]
            weights = torch.stack([query @ k for k in keys]).div(math.sqrt(12)).softmax(0)
            heads.append(weights @ expanded[: t + 1, a, 8:])
        rows.append(torch.cat(heads))
    x = x + torch.stack(rows) @ w["self_attn.o_proj"].T
    n = norm(x, w["post_attention_layernorm"])
    gate, up = n @ w["mlp.gate_proj"].T, n @ w["mlp.up_proj"].T
    return x + (gate * gate.sigmoid() * up) @ w["mlp.down_proj"].T


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 5]])
def test_draft_matches_the_paper(chunks: list[int]) -> None:
    config = ModelConfig.from_json(RAW)
    parameters = random_parameters(config, seed=3)
    model = DecoderModel(config, select("reference"), MemorySource(parameters))
    ids = torch.randint(0, 50, (10,), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(3, 4, "float32")
    hidden, drafts, start = [], [], 0
    for size in chunks:
        batch = make_batch([size], [start], [[2, 0, 1]], 4)
        hidden.append(model.forward(ids[start : start + size], batch, cache))
        drafts.append(model.draft(ids[start + 1 : start + size + 1], hidden[-1], batch, cache))
        start += size
    h = norm(torch.cat(hidden), parameters["model.norm.weight"])
    expected = expected_hidden(parameters, h, ids[1:])
    torch.testing.assert_close(torch.cat(drafts), expected, rtol=1e-4, atol=1e-4)
    head = (
        norm(expected, parameters["model.layers.2.shared_head.norm.weight"]) @ parameters["lm_head.weight"].T
    )
    torch.testing.assert_close(model.draft_logits(torch.cat(drafts)), head, rtol=1e-4, atol=1e-4)


def test_second_step_is_fed_the_normed_draft() -> None:
    config = ModelConfig.from_json(RAW)
    parameters = random_parameters(config, seed=4)
    model = DecoderModel(config, select("reference"), MemorySource(parameters))
    ids = torch.randint(0, 50, (6,), generator=torch.Generator().manual_seed(2))
    batch = make_batch([4], [0], [[0]], 4)
    cache = model.new_cache(1, 4, "float32")
    first = model.draft(ids[1:5], model.forward(ids[:4], batch, cache), batch, cache)
    second = model.draft(ids[2:6], first, batch, cache, step=1)
    fed = norm(first, parameters["model.layers.2.shared_head.norm.weight"])
    expected = expected_hidden(parameters, fed, ids[2:6])
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


def test_mtp_head_is_used_if_it_differs() -> None:
    config = ModelConfig.from_json(RAW)
    parameters = random_parameters(config, seed=5)
    own = torch.randn(50, 24)
    parameters["model.layers.2.shared_head.head.weight"] = own
    model = DecoderModel(config, select("reference"), MemorySource(parameters))
    h = torch.randn(3, 24)
    expected = norm(h, parameters["model.layers.2.shared_head.norm.weight"]) @ own.T
    torch.testing.assert_close(model.draft_logits(h), expected, rtol=1e-4, atol=1e-4)
