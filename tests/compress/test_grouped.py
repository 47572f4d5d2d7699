"""Recipes on models with grouped-query attention: transformers reads the files and computes what we do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from farthing.compress.api import Options, compress
from farthing.compress.recipe import known_recipes
from farthing.model.config import ModelConfig
from farthing.model.parameters import random_parameters
from tests.tiny import GLM4

from .conftest import write_model
from .test_transformers import check, distance, ours

RECIPES = known_recipes()

pytest.importorskip("transformers")

# Of transformers' config classes.
FILL = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "float32", "tie_word_embeddings": False}
GLM = GLM4 | FILL | {"architectures": ["Glm4MoeForCausalLM"], "partial_rotary_factor": 0.5, "rope_theta": 1e4}
QWEN = {k: v for k, v in GLM.items() if k not in ("use_qk_norm", "n_routed_experts", "attention_bias")} | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "head_dim": 64,
    "partial_rotary_factor": 1.0, "num_nextn_predict_layers": 0,
}  # fmt: skip
SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
    "head_dim": 64,
    "vocab_size": 264,
}
RECIPES_HERE = [
    pytest.param(n, marks=() if n in ("int8", "int4-rtn") else pytest.mark.slow)
    for n in RECIPES
    if not getattr(RECIPES[n], "rotate", False) and n != "adaptive-experts"
]


def written(path: Path, name: str) -> Path:
    return write_model(path, base={"glm4_moe": GLM, "qwen3_moe": QWEN}[name] | SIZES)


@pytest.mark.parametrize("recipe", RECIPES_HERE)
@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe"])
def test_compressed_models_load_and_agree(name: str, recipe: str, data: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "source", name)
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(3))
    check(source, tmp_path / "out", RECIPES[recipe], ids, calibration=data)
    config = ModelConfig.from_directory(tmp_path / "out")
    assert config.attention == ModelConfig.from_directory(source).attention
    assert 0 < distance(ours(tmp_path / "out", ids), ours(source, ids)) < 1


def test_rotation_is_refused(data: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "source", "glm4_moe")
    recipe = RECIPES["int8-kl"]
    with pytest.raises(ValueError, match="rotate: got true for model_type 'glm4_moe'; expected false"):
        compress(source, tmp_path / "out", recipe, Options(gate=False, calibration=data))


def test_all_biases_are_kept(data: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "source", "glm4_moe")
    compress(source, tmp_path / "once", RECIPES["int8"], Options(gate=False, calibration=data))
    index = json.loads((tmp_path / "once" / "model.safetensors.index.json").read_text())["weight_map"]
    biases = {n for n in random_parameters(ModelConfig.from_directory(source)) if n.endswith("proj.bias")}
    assert len(biases) == 4 * 3 and biases <= set(index)
