"""Our model against Hugging Face transformers on random tiny configurations, float32, reference ops."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.model import DeepseekModel, load
from farthing.ops import select

pytest.importorskip("transformers")

import transformers

from .families import yarn
from .paged import chunkings, greedy, run

SEEDS = range(24)
LENGTH = 21


def draw(seed: int) -> tuple[Any, str]:
    """A random tiny configuration; the seeds together cover every variant of the architecture."""
    rng = random.Random(seed)
    v3 = seed % 3 != 2
    groups = rng.choice([1, 2, 4])
    shape: dict[str, Any] = dict(
        vocab_size=rng.choice([61, 96]),
        hidden_size=rng.choice([32, 48]),
        intermediate_size=rng.choice([40, 64]),
        num_hidden_layers=rng.choice([2, 3]),
        num_attention_heads=rng.choice([2, 4]),
        kv_lora_rank=rng.choice([16, 24]),
        q_lora_rank=rng.choice([None, 20, 32]),
        qk_nope_head_dim=rng.choice([8, 16]),
        qk_rope_head_dim=rng.choice([4, 8]),
        v_head_dim=rng.choice([8, 12]),
        moe_intermediate_size=rng.choice([16, 24]),
        n_routed_experts=groups * rng.choice([4, 6]),
        n_shared_experts=rng.choice([1, 2]),
        num_experts_per_tok=rng.choice([1, 2, 4]),
        first_k_dense_replace=rng.choice([0, 1, 2]),
        n_group=groups,
        topk_group=rng.randint(1, groups),
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        max_position_embeddings=128,
        tie_word_embeddings=bool(seed % 5 == 0),
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=1,
    )
    shape["num_key_value_heads"] = shape["num_attention_heads"]
    shape["rope_parameters"] = yarn(rng) if seed % 2 else dict(rope_type="default", rope_theta=10000.0)
    if v3:
        config = transformers.DeepseekV3Config(
            **shape, norm_topk_prob=bool(seed % 4 < 2), rope_interleave=True
        )
        return config, "DeepseekV3ForCausalLM"
    method = "greedy" if seed % 2 else "group_limited_greedy"
    config = transformers.DeepseekV2Config(**shape, topk_method=method, norm_topk_prob=False)
    return config, "DeepseekV2ForCausalLM"


def build(seed: int, path: Path) -> tuple[Any, DeepseekModel]:
    """The same random weights as a transformers model and, loaded from its files, as ours."""
    config, name = draw(seed)
    torch.manual_seed(seed)
    theirs = getattr(transformers, name)(config).float().eval()
    for key, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if "norm" in key:
            value.data = 1 + 0.1 * torch.randn_like(value)
        elif "e_score_correction_bias" in key:
            value.data = 0.1 * torch.randn_like(value)
        elif "inv_freq" not in key:
            value.data = torch.randn_like(value) * value.shape[-1] ** -0.5
    theirs.save_pretrained(path)
    return theirs, load(path, select("reference", dtype=torch.float32))


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_greedy_tokens(seed: int, tmp_path: Path) -> None:
    theirs, ours = build(seed, tmp_path)
    rng = random.Random(seed)
    ids = torch.randint(0, ours.config.vocab_size, (LENGTH,))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
        scale = expected.abs().max()
        for name, chunks in chunkings(LENGTH, rng).items():
            error = (run(ours, ids, chunks) - expected).abs().max() / scale
            assert error < 1e-4, f"{name}: relative error {error:.2e}"
        assert greedy(ours, ids, 64) == theirs_greedy(theirs, ids, 64)


def theirs_greedy(model: Any, ids: torch.Tensor, steps: int) -> list[int]:
    cache, tokens, step = None, [], ids[None]
    for _ in range(steps):
        out = model(step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        tokens.append(int(step))
    return tokens
