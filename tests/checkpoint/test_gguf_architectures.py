"""GGUF files of every architecture: random models, renamed as llama.cpp's converter names them, have the
logits of their Hugging Face directory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from farthing.checkpoint.gguf import _OUTER, ARCHITECTURES  # noqa: E402
from farthing.engine.build import runs_on_arrays  # noqa: E402
from farthing.hub import resolve_model  # noqa: E402
from farthing.model.config import ModelConfig  # noqa: E402
from farthing.model.load import load  # noqa: E402
from farthing.ops.select import select  # noqa: E402
from tests.checkpoint.test_gguf import ALPHABET  # noqa: E402
from tests.parity.families import build  # noqa: E402
from tests.parity.paged import run  # noqa: E402

Config = dict[str, Any]
_LAYER = re.compile(
    r"model\.layers\.(\d+)\.(.*?)\.?(weight|bias|e_score_correction_bias|A_log|dt_bias|sinks|layer_scalar|(?:per_expert_)?scale|(?:gate_up|down)_proj(?:_bias)?)"
)


def base(c: Config) -> Config:
    heads = c["num_attention_heads"]
    size = c.get("head_dim") or c["hidden_size"] // heads
    return {
        "block_count": c["num_hidden_layers"], "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "feed_forward_length": c["intermediate_size"],
        "attention.head_count": heads, "attention.head_count_kv": c.get("num_key_value_heads", heads),
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]), "attention.key_length": size,
        "attention.value_length": size, "rope.dimension_count": size,
        "rope.freq_base": float(c["rope_parameters"]["rope_theta"]),
    }  # fmt: skip


def experts(c: Config) -> Config:
    return {
        "expert_count": c["n_routed_experts"], "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_count": c["n_shared_experts"] or 0,
        "leading_dense_block_count": c["first_k_dense_replace"],
        "expert_weights_scale": float(c["routed_scaling_factor"]), "expert_weights_norm": c["norm_topk_prob"],
    }  # fmt: skip


def deepseek2(c: Config) -> Config:
    key = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    return {
        **base({**c, "num_key_value_heads": 1, "head_dim": c["kv_lora_rank"]}), **experts(c),
        "attention.kv_lora_rank": c["kv_lora_rank"], "attention.key_length_mla": key,
        "attention.value_length_mla": c["v_head_dim"], "rope.dimension_count": c["qk_rope_head_dim"],
        "expert_group_count": c["n_group"], "expert_group_used_count": c["topk_group"],
        "expert_gating_func": 2 if c["model_type"] == "deepseek_v3" else 1,
        **({"attention.q_lora_rank": c["q_lora_rank"]} if c["q_lora_rank"] else {}),
    }  # fmt: skip


def mixtral(c: Config) -> Config:
    return {**base(c), "expert_count": c["num_local_experts"], "expert_used_count": c["num_experts_per_tok"]}


def qwen2moe(c: Config) -> Config:
    return {
        **base(c), "expert_count": c["num_experts"], "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_feed_forward_length": c["shared_expert_intermediate_size"],
    }  # fmt: skip


def olmoe(c: Config) -> Config:
    return {**base(c), "expert_count": c["num_experts"], "expert_used_count": c["num_experts_per_tok"]}


def granite(c: Config) -> Config:
    count = {"expert_count": c["num_local_experts"]} if "num_local_experts" in c else {}
    used = {"expert_used_count": c["num_experts_per_tok"]} if count else {}
    return {
        **base(c), **count, **used, "attention.scale": float(c["attention_multiplier"]),
        "embedding_scale": float(c["embedding_multiplier"]), "logit_scale": float(c["logits_scaling"]),
        "residual_scale": float(c["residual_multiplier"]),
    }  # fmt: skip


def dots1(c: Config) -> Config:
    return {**base(c), **experts(c), "expert_gating_func": 2}


def glm4moe(c: Config) -> Config:
    shared = base(c)
    share = c["rope_parameters"]["partial_rotary_factor"]
    return {
        **shared, **experts(c), "rope.dimension_count": int(share * shared["attention.key_length"]),
        "block_count": c["num_hidden_layers"] + 1, "nextn_predict_layers": 1,
        "expert_group_count": c["n_group"], "expert_group_used_count": c["topk_group"],
    }  # fmt: skip


def minimax(c: Config) -> Config:
    share = c["rope_parameters"].get("partial_rotary_factor", 1.0)
    found = mixtral(c)
    rotated = c.get("rotary_dim") or int(share * found["attention.key_length"])
    return {**found, "expert_feed_forward_length": c["intermediate_size"], "rope.dimension_count": rotated}


def qwen35moe(c: Config) -> Config:
    c = {**c, "intermediate_size": c.get("intermediate_size", 1)}
    return {**qwen2moe(c), **qwen35(c)}


def qwen35(c: Config) -> Config:
    shared = base(c)
    return {
        **shared,
        "rope.dimension_count": int(
            c["rope_parameters"]["partial_rotary_factor"] * shared["attention.key_length"]
        ),
        "ssm.conv_kernel": c["linear_conv_kernel_dim"], "ssm.state_size": c["linear_key_head_dim"],
        "ssm.group_count": c["linear_num_key_heads"], "ssm.time_step_rank": c["linear_num_value_heads"],
        "ssm.inner_size": c["linear_num_value_heads"] * c["linear_value_head_dim"],
    }  # fmt: skip


def gpt_oss(c: Config) -> Config:
    rope = c["rope_parameters"]
    scaled = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": float(rope.get("factor", 0)),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
    }  # fmt: skip
    return {
        **mixtral(c), "expert_feed_forward_length": c["intermediate_size"],
        "attention.sliding_window": c["sliding_window"], **(scaled if "factor" in rope else {}),
    }  # fmt: skip


def gemma(c: Config) -> Config:
    """What both have, with a pattern for layers; c: with the rotation of those that see all tokens."""
    cap = c["final_logit_softcapping"]
    return {
        **base({**c, "rope_parameters": c["rope_parameters"]["full_attention"]}),
        "attention.sliding_window": c["sliding_window"],
        "rope.freq_base_swa": float(c["rope_parameters"]["sliding_attention"]["rope_theta"]),
        **({"final_logit_softcapping": float(cap)} if cap else {}),
    }  # fmt: skip


def gemma4(c: Config) -> Config:
    slides = [kind == "sliding_attention" for kind in c["layer_types"]]
    own = {"head_dim": c["head_dim"], **next(iter(c["per_layer_config"].values()))}
    groups = own.get("num_key_value_heads", c["num_key_value_heads"])
    mixture = {
        "expert_count": c["num_experts"], "expert_used_count": c["top_k_experts"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
    }  # fmt: skip
    return {
        **gemma(c), **(mixture if c["enable_moe_block"] else {}),
        "attention.sliding_window_pattern": slides,
        "attention.head_count_kv": [c["num_key_value_heads"] if s else groups for s in slides],
        "attention.key_length": own["head_dim"], "attention.value_length": own["head_dim"],
        "attention.key_length_swa": c["head_dim"], "attention.value_length_swa": c["head_dim"],
        "rope.dimension_count": own["head_dim"], "rope.dimension_count_swa": c["head_dim"],
        "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0,
    }  # fmt: skip


def by_part(array: np.ndarray[Any, Any], keys: int, *widths: int) -> list[np.ndarray[Any, Any]]:
    """Rows of Qwen3-Next's fused projections, a part of all key heads together."""
    parts = np.split(array.reshape(keys, -1, array.shape[-1]), np.cumsum(widths)[:-1], 1)
    return [part.reshape(-1, array.shape[-1]) for part in parts]


def tiled(name: str, array: np.ndarray[Any, Any], c: Config) -> np.ndarray[Any, Any]:
    """A tensor of a recurrence or a norm as llama.cpp's converter writes it."""
    keys, values = (c.get(f"linear_num_{which}_heads", 0) for which in ("key", "value"))
    if name.endswith("norm.weight") and "ssm_norm" not in name:
        return array + 1
    if c["model_type"] == "qwen3_next":  # whose converter leaves value heads where they are
        array = -np.exp(array) if name.endswith("ssm_a") else array
        return array[:, 0] if "conv1d" in name else array
    if (".ssm_" not in name and not re.search("attn_(qkv|gate)", name)) or "ssm_norm" in name:
        return array
    axis = int("ssm_out" in name)
    before = 2 * keys * c["linear_key_head_dim"] if re.search("qkv|conv1d", name) else 0
    head, rest = np.split(array, [before], axis)
    rest = np.moveaxis(rest, axis, 0)
    rest = rest.reshape(keys, values // keys, -1, *rest.shape[1:]).swapaxes(0, 1).reshape(rest.shape)
    array = np.concatenate((head, np.moveaxis(rest, 0, axis)), axis)
    array = -np.exp(array) if name.endswith("ssm_a") else array
    return np.ascontiguousarray(array[:, 0] if "conv1d" in name else array)


CASES: dict[str, tuple[str, Callable[[Config], Config]]] = {
    "mixtral": ("llama", mixtral),
    "deepseek_v2": ("deepseek2", deepseek2),
    "deepseek_v3": ("deepseek2", deepseek2),
    "glm4_moe": ("glm4moe", glm4moe),
    "minimax_m2": ("minimax-m2", minimax),
    "qwen3_5_moe_text": ("qwen35moe", qwen35moe),
    "qwen3_5_text": ("qwen35", qwen35),
    "qwen3_next": ("qwen3next", qwen35moe),
    "qwen2": ("qwen2", base),
    "qwen2_moe": ("qwen2moe", qwen2moe),
    "smollm3": ("smollm3", base),
    "granite": ("granite", granite),
    "granitemoe": ("granitemoe", granite),
    "olmoe": ("olmoe", olmoe),
    "seed_oss": ("seed_oss", base),
    "dots1": ("dots1", dots1),
    "gpt_oss": ("gpt-oss", gpt_oss),
    "gemma3_text": ("gemma3", gemma),
    "gemma4_text": ("gemma4", gemma4),
}


def renamed(
    tensors: dict[str, torch.Tensor], architecture: str, c: Config, legacy: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors by GGUF's names: experts stacked, rows of rotated heads in pairs, kv_b_proj in two."""
    names, out, stacks = ARCHITECTURES[architecture], {}, {}
    layer = {v: k for k, v in names.layer.items() if not k.endswith("_b") or k == "attn_q_b"}
    experts = {v: k for k, v in names.experts.items()}
    for name, value in sorted(tensors.items(), key=lambda t: [int(n) for n in re.findall(r"\d+", t[0])]):
        found = _LAYER.fullmatch(name)
        array = value.float().numpy()
        if found is None:
            stem, _, suffix = name.rpartition(".")
            array = array + 1 if names.around_zero and stem == "model.norm" else array
            out[f"{ {v: k for k, v in _OUTER.items()}[stem] }.{suffix}"] = array
            continue
        i, module, suffix = found.groups()
        whole = layer.get(f"{module}.{suffix}".lstrip("."), "")
        if architecture == "gemma4" and "." in whole:
            out[f"blk.{i}.{whole}"] = array
            continue
        stack = re.sub(r"\.\d+\.", ".{}.", module)
        if stack in experts:
            stacks.setdefault(f"blk.{i}.{experts[stack]}.weight", []).append(array)
        elif architecture == "gpt-oss" and module == "mlp.experts":
            kind = "bias" if suffix.endswith("_bias") else "weight"
            array = array if kind == "bias" else array.swapaxes(1, 2)
            halves = {"gate": array[:, ::2], "up": array[:, 1::2]} if "gate" in suffix else {"down": array}
            for part, half in halves.items():
                out[f"blk.{i}.ffn_{part}_exps.{kind}"] = np.ascontiguousarray(half)
        elif module.endswith("in_proj_qkvz"):
            keys, size = c["linear_num_key_heads"], c["linear_key_head_dim"]
            values = c["linear_num_value_heads"] // keys * c["linear_value_head_dim"]
            if legacy:
                out[f"blk.{i}.ssm_in.weight"] = array
                continue
            *qkv, z = by_part(array, keys, size, size, values, values)
            out[f"blk.{i}.attn_qkv.weight"], out[f"blk.{i}.attn_gate.weight"] = np.concatenate(qkv), z
        elif module.endswith("in_proj_ba"):
            out[f"blk.{i}.ssm_ba.weight"] = array
        elif suffix == "sinks":
            out[f"blk.{i}.attn_sinks.weight"] = array
        elif module.endswith(("input_linear", "output_linear")):
            parts = np.split(array, 2, 1) if module.endswith("input_linear") else [array]
            for part, stacked in zip(("gate", "up") if len(parts) > 1 else ("down",), parts, strict=True):
                out[f"blk.{i}.ffn_{part}_exps.weight"] = np.ascontiguousarray(stacked)
        elif suffix in ("gate_up_proj", "down_proj"):
            if architecture == "gemma4" and suffix == "gate_up_proj" and not legacy:
                out[f"blk.{i}.ffn_gate_up_exps.weight"] = array
                continue
            parts = np.split(array, 2, 1) if suffix == "gate_up_proj" else [array]
            for part, stacked in zip(("gate", "up") if len(parts) > 1 else ("down",), parts, strict=True):
                out[f"blk.{i}.ffn_{part}_exps.weight"] = np.ascontiguousarray(stacked)
        elif suffix in ("A_log", "dt_bias"):
            name = f"blk.{i}.{layer[f'{module}.{suffix}']}"
            out[name] = tiled(name, array, c)
        elif suffix.startswith("e_score"):
            out[f"blk.{i}.exp_probs_b.bias"] = array
        elif module == "self_attn.kv_b_proj":
            nope, rank = c["qk_nope_head_dim"], c["kv_lora_rank"]
            heads = array.reshape(c["num_attention_heads"], -1, rank)
            out[f"blk.{i}.attn_k_b.weight"] = np.ascontiguousarray(heads[:, :nope].swapaxes(1, 2))
            out[f"blk.{i}.attn_v_b.weight"] = np.ascontiguousarray(heads[:, nope:])
        else:
            part = (
                "post_attention_norm"
                if "post_attention_norm" in names.layer and module == "post_attention_layernorm"
                else layer[module]
            )
            if part in names.turned:
                count = c["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
                array = array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            name = f"blk.{i}.{part}.{suffix}"
            out[name] = tiled(name, array, c) if names.around_zero else np.ascontiguousarray(array)
    return {**out, **{name: np.stack(parts) for name, parts in stacks.items()}}


@pytest.mark.parametrize(
    ("family", "legacy"),
    [*((family, False) for family in CASES), *((f, True) for f in ("qwen3_next", "gemma4_text"))],
)
def test_logits_are_those_of_the_directory(
    tmp_path: Path, family: str, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    architecture, metadata = CASES[family]
    seed = next(s for s in range(400) if _plain(build(family, s, tmp_path / str(s)).config))
    folder = tmp_path / str(seed)
    c = build(family, seed, folder).config.to_dict()
    w = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    for name, value in metadata(c).items():
        add = (
            w.add_array
            if isinstance(value, list)
            else w.add_bool
            if isinstance(value, bool)
            else w.add_uint32
            if isinstance(value, int)
            else w.add_string
            if isinstance(value, str)
            else w.add_float32
        )
        add(f"{architecture}.{name}", value)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(ALPHABET[: c["vocab_size"]] + [f"<{i}>" for i in range(len(ALPHABET), c["vocab_size"])])
    w.add_token_merges([])
    for name, array in renamed(load_file(folder / "model.safetensors"), architecture, c, legacy).items():
        w.add_tensor(name, array)
    if architecture == "glm4moe":
        w.add_tensor(f"blk.{c['num_hidden_layers']}.nextn.enorm.weight", np.ones(4, np.float32))
    if architecture == "gemma4":  # the factors of pairs that turn, and of others
        size = metadata(c)["attention.key_length"]
        turning = int(0.25 * size // 2)
        w.add_tensor(
            "rope_freqs.weight", np.array([1] * turning + [1e30] * (size // 2 - turning), np.float32)
        )
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    ids = torch.arange(12) % c["vocab_size"]
    found, expected = (
        run(load(path, select("reference", dtype=torch.float32)), ids, [12])
        for path in (resolve_model(tmp_path / "model.gguf"), folder)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    path = resolve_model(tmp_path / "model.gguf")
    if runs_on_arrays(ModelConfig.from_directory(path)):
        packed = []
        for arrays in (False, True):
            ops = select("cpu", threads=1, arrays=arrays)
            load(path, ops)
            ops.save_packed(str(tmp_path / "packed"))
            packed.append((tmp_path / "packed").read_bytes())
        assert packed[0] == packed[1], family


def _plain(config: Any) -> bool:
    """Whether GGUF says all of a random configuration: rotation of neighbours without scaling, no window."""
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        plain = rope["full_attention"]["rope_type"] == "default"
        known = config.query_pre_attn_scalar == config.head_dim
        return plain and known and slides == [bool((i + 1) % 6) for i in range(len(slides))]
    if config.model_type == "gemma4_text":
        both = len(set(config.layer_types)) == 2 and config.per_layer_config[len(config.layer_types) - 1]
        return bool(config.enable_moe_block and config.attention_k_eq_v and both)
    if config.model_type == "gpt_oss":
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        plain = (config.swiglu_limit, getattr(config, "swiglu_alpha", 1.702)) == (7.0, 1.702)
        known = rope["rope_type"] == "default" or (rope["rope_type"], rope["factor"]) == ("yarn", 32.0)
        return plain and known and slides == [i % 2 == 0 for i in range(len(slides))]
    if config.model_type == "qwen3_next" and (
        not config.norm_topk_prob or config.mlp_only_layers or config.decoder_sparse_step > 1
    ):
        return False
    if config.model_type == "qwen2_moe" and (
        config.norm_topk_prob or config.mlp_only_layers or config.decoder_sparse_step > 1
    ):
        return False
    if config.model_type == "olmoe" and config.norm_topk_prob:
        return False
    if config.model_type == "smollm3":
        plain = rope["rope_type"] == "default" and not config.use_sliding_window
        return plain and all(config.no_rope_layers)
    pairs = getattr(config, "rope_interleave", True) or config.model_type not in (
        "deepseek_v2",
        "deepseek_v3",
    )
    windowed = bool(getattr(config, "sliding_window", None))
    return rope.get("rope_type", "default") == "default" and pairs and not windowed
