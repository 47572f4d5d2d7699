"""Published configurations: parameter counts equal the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from farthing.cli.app import app
from farthing.cli.errors import Exit
from farthing.model.config import ModelConfig
from farthing.model.inspect import context_cost, model_cost
from farthing.model.parameters import parameter_shapes
from farthing.model.types import type_named
from farthing.planner.estimate import file_bytes, published, published_config
from farthing.planner.footprint import Stored, stored_by_checkpoint, stored_by_config

# Billions of total and active parameters from model cards and papers, and which of embedding and head the
# active count includes. Ours is "head": the head and one row of the embedding.
PUBLISHED: dict[str, tuple[str, str, Literal["head", "neither", "both"]]] = {
    "deepseek-v2": ("236", "21", "head"),
    "deepseek-v2-lite": ("15.7", "2.4", "head"),
    "deepseek-v3": ("671", "37", "head"),
    "deepseek-r1": ("671", "37", "head"),
    "deepseek-v3.1": ("671", "37", "head"),
    "deepseek-v3.2": ("671", "37", "head"),
    "deepseek-v4-flash": ("284", "13", "head"),
    "deepseek-v4-pro": ("1.6T", "49", "head"),
    "moonlight-16b": ("16", "3", "head"),
    "kimi-k2": ("1T", "32", "head"),  # "1T" in both model cards
    "kimi-k2.5": ("1T", "32", "head"),
    "kimi-k2.6": ("1T", "32", "head"),
    "kimi-k2-instruct": ("1T", "32", "head"),
    "kimi-k2-thinking": ("1T", "32", "head"),
    "deepseek-v3-0324": ("671", "37", "head"),
    "deepseek-r1-0528": ("671", "37", "head"),
    "deepseek-v3.1-terminus": ("671", "37", "head"),
    "deepseek-v3.2-exp": ("671", "37", "head"),
    "deepseek-v3.2-speciale": ("671", "37", "head"),
    "glm-4.7-flash": ("30", "3", "neither"),
    "glm-5": ("744", "40", "neither"),
    "glm-5.1": ("744", "40", "neither"),
    "glm-5.2": ("744", "40", "head"),  # published as GLM-5's, which has more indexers
    "mistral-large-3": ("673", "39", "head"),
    "mistral-small-4": ("119", "6", "head"),
    "a.x-k1": ("519", "33", "both"),
    "sarvam-105b": ("105", "10.3", "neither"),
    "longcat-flash": ("560", "27", "head"),
    "qwen3-30b-a3b": ("30.5", "3.3", "both"),
    "qwen3-30b-a3b-2507": ("30.5", "3.3", "both"),
    "qwen3-coder-30b-a3b": ("30.5", "3.3", "both"),
    "qwen3-235b-a22b": ("235", "22", "both"),
    "qwen3-coder-480b-a35b": ("480", "35", "head"),
    "qwen3-next-80b-a3b": ("80", "3", "neither"),
    "qwen3-coder-next": ("80", "3", "neither"),
    "qwen3.5-35b-a3b": ("35", "3", "head"),
    "qwen3.6-35b-a3b": ("35", "3", "head"),
    "glm-4.5-air": ("106", "12", "neither"),
    "glm-4.5": ("355", "32", "neither"),
    "glm-4.6": ("355", "32", "neither"),
    "glm-4.7": ("355", "32", "neither"),
    "minimax-m2": ("230", "10", "neither"),
    "mixtral-8x7b": ("46.7", "12.9", "both"),
    "mixtral-8x22b": ("141", "39", "both"),
    "olmoe-1b-7b": ("6.9", "1.3", "both"),
    "gpt-oss-20b": ("20.91", "3.61", "head"),
    "gpt-oss-120b": ("116.83", "5.13", "head"),
    "granite-3.1-3b-a800m": ("3.3", "0.8", "neither"),
    "qwen3-8b": ("8.2", "8.2", "both"),
    "llama-3.1-8b": ("8", "8", "both"),
    "llama-3.1-70b": ("70.6", "70.6", "both"),
    "llama-3.3-70b": ("70.6", "70.6", "both"),
    "mistral-7b-v0.3": ("7.25", "7.25", "both"),
    "smollm3-3b": ("3.1", "3.1", "head"),
    "smollm2-135m": ("0.135", "0.135", "head"),
    "gemma-3-270m": ("0.27", "0.27", "head"),
    "gemma-3-1b": ("1.0", "1.0", "head"),
    "gemma-4-26b-a4b": ("25.2", "3.8", "head"),
}
# 2.451 is published as 2.4, and 3.353 as 3.3: truncated, not rounded.
TRUNCATED = {"deepseek-v2-lite", "qwen3-30b-a3b", "qwen3-30b-a3b-2507", "qwen3-coder-30b-a3b"}


def test_every_configuration_has_published_counts() -> None:
    assert set(published()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str) -> None:
    raw = published_config(name)
    assert raw is not None
    config = ModelConfig.from_json(raw)
    cost = model_cost(config)
    total, active, includes = PUBLISHED[name]
    extra = {"head": 0, "neither": -1, "both": 1}[includes] * cost.head_parameters
    assert _is(cost.total_parameters, total)
    ours = cost.active_parameters + extra
    assert _is(ours, active) or (name in TRUNCATED and _is(ours - 0.05e9, active))


def _is(count: int | float, published: str) -> bool:
    """Within 1 % of a published figure in billions (trillions with "T"), or of half its last digit."""
    figure, unit = published.removesuffix("T"), 1e12 if published.endswith("T") else 1e9
    digit = 10.0 ** -len(figure.partition(".")[2])
    return abs(count / unit - float(figure)) <= max(digit / 2, 0.01 * float(figure))


@pytest.mark.parametrize("name", ["qwen3.5-35b-a3b", "qwen3.6-35b-a3b"])
def test_the_draft_layer_of_a_hybrid_is_counted(name: str) -> None:
    """Its files have one, with attention, experts and a projection of twice the width."""
    raw = published_config(name)
    assert raw is not None
    cost = model_cost(ModelConfig.from_json(raw))
    assert 256 * 3 * 2048 * 512 < cost.mtp_parameters < 850_000_000


def test_bytes_of_a_released_checkpoint() -> None:
    """GLM-5.2's files hold 1,506,659,919,872 bytes; 21 of its layers and the MTP layer have an indexer."""
    raw = published_config("glm-5.2")
    assert raw is not None
    config, of = ModelConfig.from_json(raw), stored_by_config(raw)
    assert config.index_rows == 22
    stored = sum(file_bytes(of(name), shape) for name, shape in parameter_shapes(config))
    biases = 76 * 256 * 2  # correction biases take four bytes and not two
    assert stored + biases == 1_506_659_919_872


def test_active_counts_of_longcat_flash_exclude_identities() -> None:
    raw = published_config("longcat-flash")
    assert raw is not None
    config = ModelConfig.from_json(raw)
    assert config.routed_per_token == 8  # of 12, where 256 of 768 experts are the identity
    one = 3 * 6144 * 2048
    assert model_cost(config).routed_parameters == 28 * 512 * one
    assert model_cost(config).active_routed_parameters == 28 * 8 * one


def test_bytes_follow_the_formats() -> None:
    raw = published_config("kimi-k2.5")
    assert raw is not None
    of = stored_by_config(raw)
    assert of("model.layers.5.mlp.experts.7.up_proj.weight") == Stored("int4", 32)
    assert of("model.layers.5.self_attn.o_proj.weight").kind == "bfloat16"
    fp8 = stored_by_config(published_config("deepseek-v3") or {})
    assert fp8("model.layers.5.self_attn.kv_a_proj_with_mqa.weight").kind == "fp8"
    assert fp8("model.layers.5.mlp.gate.weight").kind == "bfloat16"
    sparse = stored_by_config(published_config("deepseek-v3.2") or {})
    indexer = {
        n: sparse(f"model.layers.5.self_attn.indexer.{n}.weight").kind for n in ("wq_b", "wk", "weights_proj")
    }
    assert indexer == {"wq_b": "fp8", "wk": "fp8", "weights_proj": "bfloat16"}
    large = stored_by_config(published_config("mistral-large-3") or {})
    attention = {n: large(f"model.layers.5.self_attn.{n}.weight").kind for n in ("q_a_proj", "q_b_proj")}
    assert attention == {"q_a_proj": "bfloat16", "q_b_proj": "fp8"}
    assert large("model.layers.5.mlp.experts.7.up_proj.weight").kind == "fp8"
    small = stored_by_config(published_config("mistral-small-4") or {})
    assert small("model.layers.5.self_attn.kv_a_proj_with_mqa.weight").kind == "fp8"
    assert small("lm_head.weight").kind == "bfloat16"
    assert file_bytes(Stored("int4", 32), (64, 128)) == 64 * 128 // 2 + 64 * 4 * 2
    assert file_bytes(Stored("fp8"), (130, 256)) == 130 * 256 + 4 * 4
    assert file_bytes(Stored("bfloat16"), (7,)) == 14


def test_formats_of_a_checkpoint_with_other_names(tmp_path: Path) -> None:
    raw = published_config("mistral-large-3") or {}
    raw |= dict(dim=16, n_layers=1, hidden_dim=16, n_heads=2, vocab_size=32, q_lora_rank=8, kv_lora_rank=8)
    raw |= dict(qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    config = ModelConfig.from_json(raw)
    names = type_named("mistral_large_3").names
    tensors = {names.stored(n): torch.zeros(s, dtype=torch.bfloat16) for n, s in parameter_shapes(config)}
    tensors[names.stored("lm_head.weight")] = torch.zeros(32, 16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(raw))
    of = stored_by_checkpoint(tmp_path)
    assert of("lm_head.weight").kind == "float32"
    assert of("model.layers.0.self_attn.o_proj.weight").kind == "bfloat16"


def test_sparse_attention_costs_less_beyond_its_length() -> None:
    raw = published_config("deepseek-v3.2")
    assert raw is not None
    config = ModelConfig.from_json(raw)
    short, long = context_cost(config, 2048), context_cost(config, 131072)
    assert (short.flops, short.bytes) == (short.dense_flops, short.dense_bytes)
    assert long.bytes == 61 * (2048 * 576 + 131072 * 128) * 2
    assert long.flops == 61 * 2 * (2048 * 128 * 1088 + 131072 * 64 * 128)
    assert 4 < long.dense_bytes / long.bytes < 5


def test_deepseek_v4_scores_the_index_keys_of_its_entries() -> None:
    """21 layers with entries of 4 tokens, 20 with entries of 128; all 43 have a window of 128."""
    raw = published_config("deepseek-v4-flash")
    assert raw is not None
    config = ModelConfig.from_json(raw)
    short, long = context_cost(config, 2048), context_cost(config, 131072)
    assert (short.flops, short.bytes) == (short.dense_flops, short.dense_bytes)
    keys, scanned = 43 * 128 + 21 * 512 + 20 * 1024, 21 * 32768
    assert long.bytes == (keys * 512 + scanned * 128) * 2
    assert long.flops == 2 * 64 * (keys * 1024 + scanned * 128)
    assert long.dense_bytes == (43 * 128 + 21 * 32768 + 20 * 1024) * 512 * 2
    more = 2 * 64 * (20 * 1024 // 128 + 21 * 128 / 4)  # FLOPs of a step per token of context
    assert model_cost(config).attention_flops_per_context_token == more


def test_commands_accept_a_name() -> None:
    run = CliRunner().invoke
    shown = run(app, ["inspect", "Kimi-K2.5", "--json"])
    assert shown.exit_code == 0
    document = json.loads(shown.stdout)
    assert document["compute_saved"] > 0.96  # the range 60-80 % that others publish is for other models
    assert [c["context"] for c in document["contexts"]] == [2048, 32768, 131072]
    planned = run(app, ["plan", "deepseek-v3", "--gpu", "h100", "--price", "2.0", "--json"])
    assert planned.exit_code == 0 and json.loads(planned.stdout)["kind"] == "estimate"
    for command in ("inspect", "plan"):
        refused = run(app, [command, "deepseek-v4.1"])
        assert refused.exit_code == Exit.INPUT
        assert "deepseek-v4.1 is not supported" in refused.output
        assert "configurations like it: deepseek-v" in " ".join(refused.output.split())
    assert run(app, ["inspect", "glm-5", "--prompts", __file__]).exit_code == Exit.INPUT


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5"])
def test_tables_fit_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["inspect", name])
    assert shown.exit_code == 0 and "…" not in shown.output


def test_the_plan_counts_index_keys() -> None:
    sizes = []
    for name in ("deepseek-v3", "deepseek-v3.2"):
        sizing = ["--kv-tokens", "1600", "--max-model-len", "4096", "--tp", "8", "--ep", "8"]
        command = ["plan", name, *sizing, "--json"]
        sizes.append(json.loads(CliRunner().invoke(app, command).stdout)["ranks"][0]["cache"])
    assert sizes[1] - sizes[0] == 62 * 128 * 2 * 1600
