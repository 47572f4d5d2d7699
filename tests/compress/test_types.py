"""Recipes on types with other names, stacked experts, recurrent layers or biases: results load and agree."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from farthing.checkpoint.reader import Checkpoint
from farthing.compress.api import Options, compress
from farthing.compress.evaluate import remember
from farthing.compress.layerwise import baseline
from farthing.compress.recipe import known_recipes
from farthing.compress.source import PlainCheckpoint
from farthing.model.config import ModelConfig
from farthing.model.load import config_of, load
from farthing.model.parameters import parameter_shapes, random_parameters
from farthing.model.types import type_named
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch

pytest.importorskip("transformers")

from tests.parity.families import FAMILIES, deepseek_v4, fill, save
from tests.tiny import DEEPSEEK_V4

from .conftest import corpus_of, write_tokenizer
from .test_transformers import check, distance, ours

RECIPES = known_recipes()
TYPES = (
    *("gpt_oss", "qwen3_next", "qwen3_5_moe", "granitemoe", "mixtral", "minimax_m2", "gemma3_text"),
    "deepseek_v4",
)
WIDE = dict(hidden_size=128, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=3)
WIDE |= dict(shared_expert_intermediate_size=64, vocab_size=264, head_dim=32, linear_value_head_dim=32)
_KINDS = ["compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"]
V4 = WIDE | dict(  # its own fields, with rates that divide a block of the cache
    qk_rope_head_dim=8,
    q_lora_rank=32,
    o_lora_rank=32,
    num_attention_heads=4,
    layer_types=_KINDS,
    mlp_layer_types=["hash_moe", "moe", "moe"],
    compress_rates={_KINDS[0]: 4, _KINDS[1]: 8},
)
SERVED = ["int5", "int8", "int4-rtn", "int4", "w4a8", "fp8-block", "auto"]


def source_model(name: str, path: Path) -> Path:
    """With sizes that groups of 32 columns divide, and a tokenizer. Same weights in any order of tests."""
    torch.manual_seed(0)  # transformers rounds weights to float16, which at times flips a router's choice
    rng = random.Random(f"{name}0")
    model = deepseek_v4(rng, **V4) if name == "deepseek_v4" else FAMILIES[name](rng)
    text = model.config.get_text_config()
    for field, value in WIDE.items():
        if hasattr(text, field):
            setattr(text, field, value)
    if getattr(text, "layer_types", None) and name != "deepseek_v4":
        text.layer_types = (3 * text.layer_types)[:3]
    if WIDE["hidden_size"] % text.num_attention_heads:
        text.num_attention_heads = text.num_key_value_heads = 4
    save(name, fill(type(model)(model.config)), path)
    write_tokenizer(path)
    return path


@pytest.mark.parametrize(
    "recipe", [pytest.param(n, marks=() if n == "int4-rtn" else pytest.mark.slow) for n in SERVED]
)
@pytest.mark.parametrize("name", TYPES)
def test_compressed_models_load_and_agree(name: str, recipe: str, data: Path, tmp_path: Path) -> None:
    if (name, recipe) == ("deepseek_v4", "auto"):
        return  # refused
    source = source_model(name, tmp_path / "source")
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(3))
    check(source, tmp_path / "out", RECIPES[recipe], ids, calibration=data)
    before, after = PlainCheckpoint.open(source), PlainCheckpoint.open(tmp_path / "out")
    worst = {"int8": 0.02, "fp8-block": 0.05}.get(recipe, 0.3)
    for parameter, shape in parameter_shapes(config_of(before)):
        module, leaf = parameter.rpartition(".")[::2]
        if leaf == "weight" and len(shape) == 2:
            old, new = (checkpoint.weight(module) for checkpoint in (before, after))
            assert distance(new.dequantize(), old.dequantize()) < worst, module
            assert new.bias is None or torch.equal(new.bias, old.bias)
        else:
            assert torch.equal(after.tensor(parameter), before.tensor(parameter)), parameter


def test_a_compressed_past_is_calibrated_and_served(data: Path, tmp_path: Path) -> None:
    """DeepSeek-V4: matrices of groups of heads among those that are calibrated, the streams' as they are."""
    source = source_model("deepseek_v4", tmp_path / "source")
    options = Options(calibration=data, data=data, max_drop=0.5, max_tokens=256, window=64)
    recipe = replace(RECIPES["int4"], calibration_tokens=512)
    outcome = compress(source, tmp_path / "out", recipe, options)
    assert outcome.report.quality is not None and outcome.report.quality.kl < 0.1
    formats = {row["module"].removeprefix("model.layers.0."): row["format"] for row in outcome.report.modules}
    for module in ("q_a_proj", "kv_proj", "compressor.indexer.q_b_proj", "o_a_proj", "o_b_proj"):
        assert formats[f"self_attn.{module}"] == "int8"
    assert formats["mlp.experts.1.down_proj"] == "nl4" and "self_attn.compressor.kv_proj" not in formats
    before, after = PlainCheckpoint.open(source), PlainCheckpoint.open(tmp_path / "out")
    for name in ("model.hc_head.hc_fn", "model.layers.0.mlp.gate.tid2eid", "model.layers.1.attn_hc.fn"):
        assert torch.equal(after.tensor(name), before.tensor(name))
    with pytest.raises(ValueError, match="recipe: got 'auto' for model_type 'deepseek_v4'; expected"):
        compress(source, tmp_path / "auto", RECIPES["auto"], options)


def with_drafts(path: Path) -> Path:
    """A random DeepSeek-V4 with an MTP layer, as published."""
    raw = DEEPSEEK_V4 | {
        **dict(vocab_size=300, hidden_size=64, moe_intermediate_size=32, q_lora_rank=32, o_lora_rank=32),
        **dict(head_dim=32, num_attention_heads=4, num_hidden_layers=2, num_nextn_predict_layers=1),
        "layer_types": _KINDS[:2],
    }
    config = ModelConfig.from_json(raw)
    stored = type_named("deepseek_v4").names.in_model(config.num_hidden_layers).stored
    path.mkdir()
    save_file(
        {stored(n): t.contiguous() for n, t in random_parameters(config, 7).items()},
        path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps(raw))
    write_tokenizer(path)
    return path


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(n, marks=() if n in ("int4", "fp8-block") else pytest.mark.slow) for n in SERVED[:-1]],
)
def test_mtp_layers_that_read_streams_are_compressed(recipe: str, data: Path, tmp_path: Path) -> None:
    source, out = with_drafts(tmp_path / "source"), tmp_path / "out"
    options = Options(calibration=data, data=data, gate=False)
    report = compress(source, out, replace(RECIPES[recipe], calibration_tokens=256), options).report
    formats = {row["module"].removeprefix("model.layers.2."): row["format"] for row in report.modules}
    for module in ("e_proj", "h_proj", "self_attn.q_b_proj", "self_attn.o_a_proj", "mlp.experts.1.up_proj"):
        assert module in formats
    ids, found = torch.arange(40) * 7 % 300, []
    for path, backend in ((source, "reference"), (out, "reference"), (out, "cpu")):
        model = load(path, select(backend, torch.float32))
        cache, batch = model.new_cache(5, 8, "float32"), make_batch([40], [0], [[3, 0, 1, 4, 2]], 8)
        h = model.forward(ids, batch, cache)
        found.append(model.draft_logits(model.draft(ids.roll(-1), h, batch, cache)))
    for each in found[1:]:  # of the median token: rounding may change the choice of an expert
        errors = (each - found[0]).norm(dim=1) / found[0].norm(dim=1)
        assert 0 < errors.median() < {"int8": 0.1, "fp8-block": 0.2}.get(recipe, 0.6)


@pytest.mark.parametrize("name", [*TYPES, "glm_moe_dsa", "longcat_flash", "gemma3"])
def test_layer_by_layer_is_the_whole_model(name: str, data: Path, tmp_path: Path) -> None:
    source = source_model(name, tmp_path / "source")
    corpus = corpus_of(data, source, 64)
    whole = remember(load(source, select("reference")), corpus)
    divided = baseline(source, corpus, "reference")
    for found, expected in zip(divided.hidden, whole.hidden, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rows = whole.hidden[0][:5]
    torch.testing.assert_close(divided.tail.logits(rows), whole.tail.logits(rows), rtol=1e-4, atol=1e-4)


def test_mxfp4_stacks_are_read_expert_by_expert(data: Path, tmp_path: Path) -> None:
    """Released gpt-oss files; 4-bit groups of 32 columns hold their values nearly."""
    source = source_model("gpt_oss", tmp_path / "source")
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = experts, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 124, shape, generator=generator).to(torch.uint8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    raw = json.loads((source / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "mxfp4"}
    }
    (source / "config.json").write_text(json.dumps(raw))
    before = PlainCheckpoint.open(source)
    assert before.stored_as("model.layers.1.mlp.experts.2.up_proj")[0] == "mxfp4"
    outcome = compress(source, tmp_path / "out", RECIPES["int4-rtn"], Options(gate=False))
    after = PlainCheckpoint.open(tmp_path / "out")
    assert after.stored_as("model.layers.1.mlp.experts.2.up_proj")[0] == "int4"
    for module in ("model.layers.0.mlp.experts.1.gate_proj", "model.layers.2.mlp.experts.3.down_proj"):
        assert distance(after.weight(module).dequantize(), before.weight(module).dequantize()) < 0.2
    ids = torch.randint(2, 258, (40,), generator=generator)
    assert 0 < distance(ours(tmp_path / "out", ids), ours(source, ids)) < 1
    assert outcome.report.transformers_limits


def test_a_vision_tower_is_copied(data: Path, tmp_path: Path) -> None:
    source = source_model("qwen3_5_moe", tmp_path / "source")
    compress(source, tmp_path / "out", RECIPES["int8"], Options(gate=False, calibration=data))
    tower = {n for n in Checkpoint.open(source).names() if n.startswith("model.visual.")}
    assert tower and tower <= set(Checkpoint.open(tmp_path / "out").names())


@pytest.mark.parametrize(("recipe", "field"), [("smoothquant", "scaling"), ("experts-reap", "experts")])
def test_recipes_that_change_functions_are_refused(
    recipe: str, field: str, data: Path, tmp_path: Path
) -> None:
    source = source_model("gpt_oss", tmp_path / "source")
    with pytest.raises(ValueError, match=f"{field}: got .* for model_type 'gpt_oss'; expected a recipe"):
        compress(source, tmp_path / "out", RECIPES[recipe], Options(gate=False, calibration=data))


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss", "granitemoe"])
def test_the_gate_and_adaptive_experts(name: str, data: Path, tmp_path: Path) -> None:
    source = source_model(name, tmp_path / "source")
    options = Options(calibration=data, data=data, max_drop=0.5, max_tokens=256, window=64)
    outcome = compress(source, tmp_path / "int8", RECIPES["int8"], options)
    assert outcome.report.quality is not None and outcome.report.quality.kl < 0.5
    adaptive = replace(RECIPES["adaptive-experts"], max_drop=0.5, calibration_tokens=256, window=64)
    compress(source, tmp_path / "adaptive", adaptive, replace(options, gate=False))
    routers = load(tmp_path / "adaptive", select("reference")).config
    assert routers == ModelConfig.from_directory(source)
    assert "adaptive_experts" in json.loads((tmp_path / "adaptive" / "config.json").read_text())
