"""Sparse attention and everything that moves cache blocks: prefixes, preemption, chunks, rejected drafts.

The dense model's tests on models that attend to 8 selected tokens: index keys move with the latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from farthing.engine.request import SamplingParams
from farthing.llm import LLM
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import random_model
from farthing.model.parameters import random_parameters
from farthing.ops.reference import ReferenceOps
from farthing.ops.select import select

from .conftest import RAW, Greedy, greedy_of
from .test_engine import (  # noqa: F401  (collected here again, with this file's model)
    test_second_turn_reuses_the_cache,
    test_tokens_equal_those_of_the_model,
)

SPARSE: dict[str, Any] = RAW | dict(index_topk=8, index_n_heads=24, index_head_dim=8, num_hidden_layers=3)
TYPES: dict[str, dict[str, Any]] = {
    "deepseek_v32": SPARSE | dict(model_type="deepseek_v32"),
    "glm_moe_dsa": SPARSE | dict(model_type="glm_moe_dsa", indexer_types=["full", "shared", "full"]),
}


@pytest.fixture(
    scope="module",
    params=[("deepseek_v32", "reference"), ("glm_moe_dsa", "reference"), ("glm_moe_dsa", "cpu")],
    ids="-".join,
)
def model(request: pytest.FixtureRequest) -> DecoderModel:
    name, backend = request.param
    torch.set_num_threads(1)
    return random_model(ModelConfig.from_json(TYPES[name]), select(backend, torch.float32, 1), seed=7)


@pytest.fixture(scope="module")
def greedy(model: DecoderModel) -> Greedy:
    """Greedy tokens of a second model, because the CPU kernels run one call at a time."""
    if isinstance(model.ops, ReferenceOps):
        return greedy_of(model)
    return greedy_of(random_model(model.config, select("cpu", torch.float32, 1), seed=7))


def save(raw: dict[str, Any], path: Path) -> Path:
    """Save a checkpoint with random weights."""
    (path / "config.json").write_text(json.dumps(raw))
    save_file(random_parameters(ModelConfig.from_json(raw), seed=7), path / "model.safetensors")
    return path


@pytest.mark.slow
def test_a_prefill_process_computes_index_keys_too(tmp_path: Path) -> None:
    path = save(TYPES["deepseek_v32"], tmp_path)
    prompts = [list(range(20, 75)), [9] * 33, list(range(20, 44))]
    found = []
    for disaggregate in (False, True):
        llm = LLM(
            str(path), backend="reference", dtype="float32", skip_tokenizer_init=True, block_size=4,
            num_blocks=64, disaggregate=disaggregate,
        )  # fmt: skip
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        found.append([o.outputs[0].token_ids for o in outputs])
        llm.close()
    assert found[0] == found[1]
