"""Our model against Hugging Face transformers on random tiny configurations, float32, reference ops."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.model.decoder import DecoderModel
from farthing.model.load import load
from farthing.ops.select import select

pytest.importorskip("transformers")

import transformers

from .families import shape, yarn
from .paged import chunkings, continues_greedily, greedy, run

# Six seeds have both models, every group of experts, YaRN, tied embeddings, and each way to route.
SEEDS = [pytest.param(seed, marks=pytest.mark.slow if seed >= 6 else ()) for seed in range(24)]
LENGTH = 21


def configuration(seed: int) -> tuple[Any, str]:
    """A random tiny configuration; the seeds together cover every variant of the architecture."""
    rng = random.Random(seed)
    v3 = seed % 3 != 2
    groups = rng.choice([1, 2, 4])
    fields = shape(rng, groups) | dict(
        vocab_size=rng.choice([61, 96]),
        q_lora_rank=rng.choice([None, 20, 32]),
        first_k_dense_replace=rng.choice([0, 1, 2]),
        norm_topk_prob=v3 and seed % 4 < 2,
        tie_word_embeddings=seed % 5 == 0,
        rope_parameters=yarn(rng) if seed % 2 else dict(rope_type="default", rope_theta=10000.0),
    )
    if v3:
        return transformers.DeepseekV3Config(**fields, rope_interleave=True), "DeepseekV3ForCausalLM"
    method = "greedy" if seed % 2 else "group_limited_greedy"
    config = transformers.DeepseekV2Config(**fields, topk_method=method)
    return config, "DeepseekV2ForCausalLM"


def build(seed: int, path: Path) -> tuple[Any, DecoderModel]:
    """The same random weights as a transformers model and, loaded from its files, as ours."""
    config, name = configuration(seed)
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
        tokens = greedy(ours, ids, 64)
        whole = torch.cat((ids, torch.tensor(tokens[:-1])))
        assert continues_greedily(theirs(whole[None]).logits[0], LENGTH, tokens)
