"""Random tiny configurations of every model type, built and saved by transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

Build = Callable[[random.Random], Any]  # -> a transformers model with default initialization


def shape(rng: random.Random, groups: int = 1) -> dict[str, Any]:
    """Fields common to all types, with V3's names."""
    heads, layers = rng.choice([2, 4]), rng.choice([2, 3])
    return dict(
        vocab_size=rng.choice([60, 96]),
        hidden_size=rng.choice([32, 48]),
        intermediate_size=rng.choice([40, 64]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=rng.choice([16, 24]),
        q_lora_rank=rng.choice([20, 32]),
        qk_nope_head_dim=rng.choice([8, 16]),
        qk_rope_head_dim=rng.choice([4, 8]),
        v_head_dim=rng.choice([8, 12]),
        moe_intermediate_size=rng.choice([16, 24]),
        n_routed_experts=groups * rng.choice([4, 6]),
        n_shared_experts=rng.choice([1, 2]),
        num_experts_per_tok=rng.choice([1, 2, 4]),
        n_group=groups,
        topk_group=rng.randint(1, groups),
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        norm_topk_prob=True,
        max_position_embeddings=128,
        rms_norm_eps=rng.choice([1e-6, 1e-3]),
        bos_token_id=0,
        eos_token_id=1,
    )


def yarn(rng: random.Random, **more: Any) -> dict[str, Any]:
    """YaRN fields as in V3."""
    return dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=rng.choice([4.0, 40.0]),
        original_max_position_embeddings=32,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=rng.random() < 0.5,
        mscale=1.0,
        mscale_all_dim=rng.choice([1.0, 0.707]),
        **more,
    )


def rope(rng: random.Random) -> dict[str, Any]:
    """Plain RoPE or YaRN."""
    return yarn(rng) if rng.random() < 0.5 else dict(rope_type="default", rope_theta=10000.0)


def mlp_layers(rng: random.Random, layers: int) -> list[str]:
    """A dense prefix and at least one mixture of experts."""
    dense = rng.randint(0, layers - 1)
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def deepseek_v3(rng: random.Random) -> Any:
    s = shape(rng, groups=rng.choice([1, 2])) | dict(q_lora_rank=rng.choice([None, 20]))
    s |= dict(rope_parameters=rope(rng), first_k_dense_replace=rng.choice([0, 1]))
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**s))


def deepseek_v2(rng: random.Random) -> Any:
    s = shape(rng, groups=rng.choice([1, 2])) | dict(q_lora_rank=rng.choice([None, 20]))
    s |= dict(rope_parameters=rope(rng), first_k_dense_replace=rng.choice([0, 1]), norm_topk_prob=False)
    method = "greedy" if s["n_group"] == 1 else "group_limited_greedy"
    return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**s, topk_method=method))


def kimi_k25(rng: random.Random) -> Any:
    text = shape(rng) | dict(rope_parameters=rope(rng), first_k_dense_replace=1, num_nextn_predict_layers=0)
    text |= dict(model_type="deepseek_v3", tie_word_embeddings=False)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=32, tie_word_embeddings=False
    )
    return transformers.Kimi_K25ForConditionalGeneration(config)


def glm4_moe_lite(rng: random.Random) -> Any:
    s = shape(rng)
    layers = mlp_layers(rng, s["num_hidden_layers"])
    config = transformers.Glm4MoeLiteConfig(**s, rope_parameters=rope(rng), mlp_layer_types=layers)
    return transformers.Glm4MoeLiteForCausalLM(config)


def mistral4(rng: random.Random) -> Any:
    s = shape(rng, groups=rng.choice([1, 2]))
    scaled = yarn(rng, llama_4_scaling_beta=0.1) | {"original_max_position_embeddings": 8}
    config = transformers.Mistral4Config(
        **s, rope_parameters=scaled, first_k_dense_replace=rng.choice([0, 1])
    )
    return transformers.Mistral4ForCausalLM(config)


def mistral3(rng: random.Random) -> Any:
    """Mistral Small 4 in its wrapper, whose tie_word_embeddings wins over the language model's."""
    text = mistral4(rng).config.to_dict()
    vision = dict(model_type="pixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    vision |= dict(num_attention_heads=2, head_dim=16, image_size=28, patch_size=14)
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=rng.random() < 0.5
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def axk1(rng: random.Random) -> Any:
    s = shape(rng, groups=rng.choice([1, 2]))
    layers = mlp_layers(rng, s["num_hidden_layers"])
    return transformers.AXK1ForCausalLM(
        transformers.AXK1Config(**s, rope_parameters=rope(rng), mlp_layer_types=layers)
    )


def sarvam_mla(rng: random.Random) -> Any:
    s = shape(rng) | dict(q_lora_rank=None, rope_parameters=rope(rng), first_k_dense_replace=1)
    config = transformers.SarvamMLAConfig(**s)
    return transformers.AutoModelForCausalLM.from_config(config)


def sparse(rng: random.Random) -> dict[str, Any]:
    """Few selected positions, and enough index heads to avoid ties at 0."""
    s = shape(rng) | dict(qk_rope_head_dim=4, rope_parameters=rope(rng))
    s |= dict(index_topk=rng.choice([4, 8, 16, 64]), index_n_heads=24, index_head_dim=rng.choice([8, 16]))
    return s | dict(mlp_layer_types=mlp_layers(rng, s["num_hidden_layers"]))


def deepseek_v32(rng: random.Random) -> Any:
    return transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**sparse(rng)))


def glm_moe_dsa(rng: random.Random) -> Any:
    s = sparse(rng) | dict(num_hidden_layers=3)
    s |= dict(mlp_layer_types=mlp_layers(rng, 3))
    kinds = ["full", *(rng.choice(["full", "shared"]) for _ in range(2))]
    return transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**s, indexer_types=kinds))


def longcat_flash(rng: random.Random) -> Any:
    s = shape(rng)
    s |= dict(
        num_layers=2,
        ffn_hidden_size=s.pop("intermediate_size"),
        expert_ffn_hidden_size=s.pop("moe_intermediate_size"),
        moe_topk=max(s.pop("num_experts_per_tok"), 2),  # transformers 5.24 fails with one expert per token
        zero_expert_num=rng.choice([2, 3, 4]),
        head_dim=s["qk_rope_head_dim"],
        rope_parameters=rope(rng),
    )
    for name in ("num_hidden_layers", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob"):
        del s[name]
    return transformers.LongcatFlashForCausalLM(transformers.LongcatFlashConfig(**s))


def grouped(rng: random.Random) -> dict[str, Any]:
    """Fields common to types with grouped-query attention; sizes are odd on purpose."""
    heads = rng.choice([2, 4, 6])
    return dict(
        vocab_size=rng.choice([61, 96]),
        hidden_size=heads * rng.choice([8, 12]),
        intermediate_size=rng.choice([40, 64]),
        num_hidden_layers=rng.choice([2, 3]),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([n for n in (1, 2, 3, 6) if heads % n == 0]),
        max_position_embeddings=128,
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        tie_word_embeddings=rng.random() < 0.3,
        bos_token_id=0,
        eos_token_id=1,
    )


def routed(rng: random.Random, count: str = "num_experts") -> dict[str, Any]:
    """Fields of a mixture whose expert count has that name."""
    return {count: rng.choice([4, 6]), "num_experts_per_tok": rng.choice([1, 2, 4])}


def scaled_rope(rng: random.Random, **more: Any) -> dict[str, Any]:
    """Plain, or scaled in one of the ways that released models use."""
    way = rng.choice(["default", "llama3", "linear", "yarn"])
    found: dict[str, Any] = dict(rope_type=way, rope_theta=rng.choice([10000.0, 5e5]), **more)
    if way != "default":
        found |= dict(factor=4.0)
    if way in ("llama3", "yarn"):
        found |= dict(original_max_position_embeddings=16)
    if way == "llama3":
        found |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    return found


def llama(rng: random.Random) -> Any:
    s = grouped(rng) | dict(rope_parameters=scaled_rope(rng), attention_bias=rng.random() < 0.5)
    s |= dict(head_dim=rng.choice([None, 10, 16]))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**s))


def mistral(rng: random.Random) -> Any:
    s = grouped(rng) | dict(rope_parameters=scaled_rope(rng), sliding_window=rng.choice([None, 5, 16]))
    s |= dict(head_dim=rng.choice([s["hidden_size"] // s["num_attention_heads"], 10, 16]))
    return transformers.MistralForCausalLM(transformers.MistralConfig(**s))


def qwen2(rng: random.Random) -> Any:
    s = grouped(rng) | dict(rope_parameters=scaled_rope(rng), use_sliding_window=rng.random() < 0.5)
    s |= dict(sliding_window=rng.choice([5, 16]), max_window_layers=rng.choice([0, 1]))
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**s))


def seed_oss(rng: random.Random) -> Any:
    s = grouped(rng) | dict(rope_parameters=scaled_rope(rng), head_dim=rng.choice([None, 10, 16]))
    s |= dict(attention_bias=rng.random() < 0.7, pad_token_id=0)
    s |= dict(attention_out_bias=s["attention_bias"] and rng.random() < 0.5)
    return transformers.SeedOssForCausalLM(transformers.SeedOssConfig(**s))


def granite(rng: random.Random) -> Any:
    s = grouped(rng) | dict(rope_parameters=scaled_rope(rng), attention_bias=rng.random() < 0.5)
    s |= dict(embedding_multiplier=rng.choice([1.0, 12.0]), residual_multiplier=rng.choice([1.0, 0.22]))
    s |= dict(attention_multiplier=rng.choice([0.1, 0.5]), logits_scaling=rng.choice([1.0, 6.0]))
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**s))


def qwen3(rng: random.Random) -> Any:
    s = grouped(rng) | dict(rope_parameters=scaled_rope(rng), attention_bias=rng.random() < 0.5)
    s |= dict(use_sliding_window=rng.random() < 0.5, sliding_window=rng.choice([5, 16]))
    s |= dict(head_dim=rng.choice([8, 20]), max_window_layers=rng.choice([0, 1]))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**s))


def smollm3(rng: random.Random) -> Any:
    s = grouped(rng) | dict(rope_parameters=scaled_rope(rng), attention_bias=rng.random() < 0.5)
    s |= dict(num_hidden_layers=3, no_rope_layer_interval=rng.choice([2, 3]), pad_token_id=0)
    s |= dict(use_sliding_window=rng.random() < 0.5, sliding_window=rng.choice([5, 16]))
    s |= dict(no_rope_layers=rng.choice([None, None, [1, 0, 0], [0, 1, 0], [1, 1, 1]]))
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**s))


def qwen3_moe(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng) | dict(rope_parameters=scaled_rope(rng))
    s |= dict(moe_intermediate_size=rng.choice([16, 24]), norm_topk_prob=rng.random() < 0.5)
    s |= dict(mlp_only_layers=rng.choice([[], [0], [1]]), decoder_sparse_step=rng.choice([1, 1, 2]))
    s |= dict(head_dim=rng.choice([8, 20]), attention_bias=rng.random() < 0.5)
    s |= dict(use_sliding_window=rng.random() < 0.3, sliding_window=rng.choice([5, 16]))
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**s))


def qwen2_moe(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng) | dict(rope_parameters=scaled_rope(rng), qkv_bias=rng.random() < 0.7)
    s |= dict(moe_intermediate_size=rng.choice([16, 24]), norm_topk_prob=rng.random() < 0.5)
    s |= dict(mlp_only_layers=rng.choice([[], [0], [1]]), decoder_sparse_step=rng.choice([1, 1, 2]))
    s |= dict(use_sliding_window=rng.random() < 0.5, sliding_window=rng.choice([5, 16]))
    s |= dict(max_window_layers=rng.choice([1, 2, 28]))
    s |= dict(shared_expert_intermediate_size=rng.choice([12, 24]))
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**s))


def dots1(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng, "n_routed_experts") | dict(rope_parameters=scaled_rope(rng))
    s |= dict(moe_intermediate_size=rng.choice([16, 24]), n_shared_experts=rng.choice([1, 2]))
    s |= dict(first_k_dense_replace=rng.choice([0, 1]), routed_scaling_factor=rng.choice([1.0, 2.5]))
    s |= dict(norm_topk_prob=rng.random() < 0.7, n_group=rng.choice([1, 1, 2]))
    s |= dict(topk_group=rng.randint(1, s["n_group"]), attention_bias=rng.random() < 0.5)
    s |= dict(num_experts_per_tok=min(s["num_experts_per_tok"], s["topk_group"] * 2))
    s |= dict(sliding_window=rng.choice([None, 5, 16]), max_window_layers=rng.choice([0, 1, 62]))
    return transformers.Dots1ForCausalLM(transformers.Dots1Config(**s))


def solar_open(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng, "n_routed_experts") | dict(head_dim=rng.choice([8, 16]))
    s |= dict(rope_parameters=scaled_rope(rng))
    s |= dict(moe_intermediate_size=rng.choice([16, 24]), n_shared_experts=rng.choice([1, 2]))
    s |= dict(attention_bias=rng.random() < 0.5, routed_scaling_factor=rng.choice([1.0, 2.5]))
    s |= dict(norm_topk_prob=rng.random() < 0.7)
    del s["intermediate_size"]
    return transformers.SolarOpenForCausalLM(transformers.SolarOpenConfig(**s))


def glm4_moe(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng, "n_routed_experts") | dict(head_dim=rng.choice([8, 16]))
    s |= dict(rope_parameters=scaled_rope(rng, partial_rotary_factor=rng.choice([0.25, 0.5, 1.0])))
    s |= dict(moe_intermediate_size=rng.choice([16, 24]), n_shared_experts=rng.choice([1, 2]))
    s |= dict(use_qk_norm=rng.random() < 0.5, attention_bias=rng.random() < 0.5, num_mtp_layers=0)
    s |= dict(first_k_dense_replace=rng.choice([0, 1]), routed_scaling_factor=rng.choice([1.0, 2.5]))
    s |= dict(norm_topk_prob=rng.random() < 0.7, n_group=rng.choice([1, 1, 2]))
    s |= dict(topk_group=rng.randint(1, s["n_group"]))
    s |= dict(num_experts_per_tok=min(s["num_experts_per_tok"], s["topk_group"] * 2))
    return transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**s))


def minimax_m2(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng, "num_local_experts") | dict(head_dim=rng.choice([8, 16]))
    s |= dict(rope_parameters=scaled_rope(rng, partial_rotary_factor=rng.choice([0.25, 0.5, 1.0])))
    return transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**s))


def mixtral(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng, "num_local_experts") | dict(rope_parameters=scaled_rope(rng))
    s |= dict(head_dim=rng.choice([None, 10]), sliding_window=rng.choice([None, 5, 16]))
    if s["rope_parameters"]["rope_type"] != "default":  # transformers 5.24 then fails without a head_dim
        s["head_dim"] = s["head_dim"] or s["hidden_size"] // s["num_attention_heads"]
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**s))


def olmoe(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng) | dict(rope_parameters=scaled_rope(rng), pad_token_id=0)
    s |= dict(norm_topk_prob=rng.random() < 0.5, attention_bias=rng.random() < 0.5)
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**s))


def granitemoe(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng, "num_local_experts") | dict(rope_parameters=scaled_rope(rng))
    s |= dict(attention_bias=rng.random() < 0.5, attention_multiplier=rng.choice([0.1, 0.5]))
    s |= dict(embedding_multiplier=rng.choice([1.0, 12.0]), residual_multiplier=rng.choice([1.0, 0.22]))
    return transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(**s, logits_scaling=rng.choice([1.0, 6.0]))
    )


def hybrid(rng: random.Random) -> dict[str, Any]:
    """Fields of types with Gated DeltaNet in some layers, listed or every so many."""
    layers = rng.choice([3, 4])
    s = grouped(rng) | routed(rng) | dict(num_hidden_layers=layers, head_dim=rng.choice([8, 16, 24]))
    s |= dict(rope_parameters=scaled_rope(rng, partial_rotary_factor=rng.choice([0.25, 0.5, 1.0])))
    s |= dict(moe_intermediate_size=rng.choice([16, 24]), attention_bias=rng.random() < 0.3)
    s |= dict(shared_expert_intermediate_size=rng.choice([12, 24]))
    keys = rng.choice([1, 2, 3])
    s |= dict(linear_num_key_heads=keys, linear_num_value_heads=keys * rng.choice([1, 2, 3]))
    s |= dict(linear_key_head_dim=rng.choice([8, 10, 16]), linear_value_head_dim=rng.choice([8, 12, 16]))
    s |= dict(linear_conv_kernel_dim=rng.choice([2, 3, 4, 4]))
    if rng.random() < 0.5:
        return s | dict(full_attention_interval=rng.choice([2, 3]))
    kinds = ["linear_attention", "full_attention"]
    return s | dict(layer_types=[*kinds, *(rng.choice(kinds) for _ in range(layers - 2))])


def qwen3_next(rng: random.Random) -> Any:
    s = hybrid(rng) | dict(norm_topk_prob=rng.random() < 0.5)
    s |= dict(mlp_only_layers=rng.choice([[], [0], [1]]), decoder_sparse_step=rng.choice([1, 1, 2]))
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**s))


def _with_vision(text: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(text_config, vision_config) of Qwen3.5's wrappers."""
    half = int(text["head_dim"] * text["rope_parameters"]["partial_rotary_factor"]) // 2
    text["rope_parameters"] |= dict(mrope_section=[half, 0, 0], mrope_interleaved=True)
    vision = dict(hidden_size=32, intermediate_size=32, depth=1, num_heads=2, patch_size=4)
    vision |= dict(out_hidden_size=text["hidden_size"], num_position_embeddings=16)
    return text, vision


def qwen3_5_moe(rng: random.Random) -> Any:
    """In its wrapper with a vision tower, as released."""
    text, vision = _with_vision(hybrid(rng))
    del text["intermediate_size"]
    tied = text.pop("tie_word_embeddings")
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def qwen3_5(rng: random.Random) -> Any:
    """In its wrapper with a vision tower, as released."""
    text, vision = _with_vision(hybrid(rng))
    tied = text.pop("tie_word_embeddings")
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        del text[name]
    del text["shared_expert_intermediate_size"]
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return transformers.Qwen3_5ForConditionalGeneration(config)


def qwen3_5_text(rng: random.Random) -> Any:
    config = qwen3_5(rng).config
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    return transformers.Qwen3_5ForCausalLM(config.text_config)


def qwen3_5_moe_text(rng: random.Random) -> Any:
    config = qwen3_5_moe(rng).config
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    return transformers.Qwen3_5MoeForCausalLM(config.text_config)


def gpt_oss(rng: random.Random) -> Any:
    s = grouped(rng) | routed(rng, "num_local_experts") | dict(head_dim=rng.choice([8, 16, 20]))
    s |= dict(sliding_window=rng.choice([1, 3, 8, 17]), attention_bias=rng.random() < 0.8, pad_token_id=0)
    s |= dict(swiglu_limit=rng.choice([0.7, 7.0]), swiglu_alpha=rng.choice([1.0, 1.702]))
    scaled = dict(rope_type="yarn", rope_theta=150000.0, factor=rng.choice([4.0, 32.0]), truncate=False)
    scaled |= dict(beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=rng.choice([16, 64]))
    s |= dict(rope_parameters=scaled if rng.random() < 0.7 else scaled_rope(rng))
    if rng.random() < 0.5:
        kinds = ("full_attention", "sliding_attention")
        s |= dict(layer_types=[rng.choice(kinds) for _ in range(s["num_hidden_layers"])])
    config = transformers.GptOssConfig(**s, attn_implementation="eager")
    return transformers.GptOssForCausalLM(config)


def gemma(rng: random.Random) -> dict[str, Any]:
    """Fields common to Gemma's types."""
    s = grouped(rng) | dict(head_dim=rng.choice([8, 16, 20]), sliding_window=rng.choice([1, 3, 8, 17]))
    s |= dict(num_hidden_layers=rng.choice([2, 3, 7]), pad_token_id=0, attn_implementation="eager")
    if rng.random() < 0.5:
        kinds = ("full_attention", "sliding_attention")
        s |= dict(layer_types=[rng.choice(kinds) for _ in range(s["num_hidden_layers"])])
    else:
        s |= dict(sliding_window_pattern=rng.choice([1, 2, 6]))
    return s | dict(final_logit_softcapping=rng.choice([None, 2.0, 30.0]))


def gemma3_text(rng: random.Random) -> Any:
    s = gemma(rng) | dict(query_pre_attn_scalar=rng.choice([8, 24]))
    if rng.random() < 0.5:
        full, local = scaled_rope(rng), scaled_rope(rng) | dict(rope_theta=100.0)
        s |= dict(rope_parameters=dict(full_attention=full, sliding_attention=local))
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**s))


def gemma3(rng: random.Random) -> Any:
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    text = gemma3_text(rng).config
    text.final_logit_softcapping = None  # transformers ignores it in this class
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=text.tie_word_embeddings
    )
    config._attn_implementation = "eager"
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4_text(rng: random.Random) -> Any:
    s = gemma(rng) | dict(hidden_size_per_layer_input=0, global_head_dim=rng.choice([8, 16, 24]))
    s |= dict(attention_k_eq_v=rng.random() < 0.5)
    groups = [n for n in (1, 2, 3) if s["num_attention_heads"] % n == 0]
    s |= dict(num_global_key_value_heads=rng.choice([None, *groups]))
    if rng.random() < 0.7:
        found = routed(rng)
        s |= dict(enable_moe_block=True, num_experts=found["num_experts"], moe_intermediate_size=24)
        s |= dict(top_k_experts=found["num_experts_per_tok"])
    if rng.random() < 0.5:
        full = dict(rope_type="proportional", partial_rotary_factor=rng.choice([0.25, 0.5, 1.0]))
        full |= dict(rope_theta=rng.choice([1e2, 1e6]), factor=rng.choice([1.0, 8.0]))
        local = dict(rope_type="default", rope_theta=rng.choice([1e2, 1e4]))
        s |= dict(rope_parameters=dict(full_attention=full, sliding_attention=local))
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**s))


def gemma4(rng: random.Random) -> Any:
    """In its wrapper with a vision tower, as released."""
    text = gemma4_text(rng).config
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(num_key_value_heads=2, head_dim=16, patch_size=4, position_embedding_size=16)
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config._attn_implementation = "eager"
    return transformers.Gemma4ForConditionalGeneration(config)


def deepseek_v4(rng: random.Random, **changes: Any) -> Any:
    """Rates small enough for short prompts to cross windows."""
    heads, layers, groups = rng.choice([2, 4]), rng.choice([3, 4]), rng.choice([1, 2])
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    chosen = [*rng.sample(kinds[1:], 2), *(rng.choice(kinds) for _ in range(layers - 2))]
    rng.shuffle(chosen)
    sparse = rng.choice([2, 3, 4])
    compress = dict(rope_type="yarn", factor=rng.choice([4.0, 16.0]), original_max_position_embeddings=16)
    compress |= dict(beta_fast=32.0, beta_slow=1.0)
    settings = dict(
        vocab_size=rng.choice([61, 96]),
        hidden_size=rng.choice([32, 48]),
        moe_intermediate_size=rng.choice([16, 24]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=rng.choice([16, 24]),
        qk_rope_head_dim=rng.choice([4, 8]),
        q_lora_rank=rng.choice([20, 32]),
        num_experts_per_tok=rng.choice([1, 2, 4]),
        n_routed_experts=rng.choice([4, 6]),
        routed_scaling_factor=rng.choice([1.0, 1.5]),
        max_position_embeddings=512,
        layer_types=chosen,
        compress_rates=dict(zip(kinds[1:], (sparse, sparse * rng.choice([2, 4])), strict=True)),
        rope_parameters=compress if rng.random() < 0.7 else None,
        hc_mult=rng.choice([2, 4]),
        hc_sinkhorn_iters=rng.choice([2, 20]),
        mlp_layer_types=[rng.choice(["hash_moe", "moe"]) for _ in range(layers)],
        swiglu_limit=rng.choice([0.7, 10.0]),
        sliding_window=rng.choice([3, 8, 12]),
        o_groups=groups,
        o_lora_rank=rng.choice([8, 12]),
        index_n_heads=24,
        index_head_dim=rng.choice([8, 16]),
        index_topk=rng.choice([1, 2, 8]),
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        attn_implementation="eager",
    )
    return transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**settings | changes))


DENSE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "seed_oss",
    "granite",
    "qwen3_5",
    "qwen3_5_text",
)  # types without experts
WHOLE_NORM = ("minimax_m2", "olmoe")  # that norm the queries of all heads together
GROUPED: dict[str, Build] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
    "seed_oss": seed_oss,
    "granite": granite,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "glm4_moe": glm4_moe,
    "minimax_m2": minimax_m2,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "granitemoe": granitemoe,
    "dots1": dots1,
    "solar_open": solar_open,
    "qwen3_next": qwen3_next,
    "qwen3_5": qwen3_5,
    "qwen3_5_text": qwen3_5_text,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_text": qwen3_5_moe_text,
    "gpt_oss": gpt_oss,
    "gemma3_text": gemma3_text,
    "gemma3": gemma3,
    "gemma4_text": gemma4_text,
    "gemma4": gemma4,
}
FAMILIES: dict[str, Build] = {
    "deepseek_v3": deepseek_v3,
    "deepseek_v2": deepseek_v2,
    "kimi_k25": kimi_k25,
    "glm4_moe_lite": glm4_moe_lite,
    "mistral4": mistral4,
    "mistral3": mistral3,
    "axk1": axk1,
    "deepseek_v32": deepseek_v32,
    "glm_moe_dsa": glm_moe_dsa,
    "sarvam_mla": sarvam_mla,
    "longcat_flash": longcat_flash,
    "deepseek_v4": deepseek_v4,
    **GROUPED,
}


def build(name: str, seed: int, path: Path) -> Any:
    """A transformers model with random weights of plausible scale, saved to `path`."""
    torch.manual_seed(seed)
    model = fill(FAMILIES[name](random.Random(f"{name}{seed}")))
    save(name, model, path, published=seed % 2 == 0)
    return model


def fill(model: Any) -> Any:
    """Random float32 weights of plausible scale."""
    model = model.float().eval()
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith("tid2eid"):
            experts = model.config.num_local_experts
            value.data = torch.rand(len(value), experts).argsort(-1)[:, : value.shape[1]].contiguous()
        if not value.is_floating_point() or "inv_freq" in key:
            continue
        if "norm" in key and value.ndim == 1:
            value.data = (0.0 if key.endswith("bias") else 1.0) + 0.1 * torch.randn_like(value)
        elif "e_score_correction_bias" in key or key.endswith("bias"):
            value.data = 0.1 * torch.randn_like(value)
        elif key.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
            value.data = 0.5 + torch.rand_like(value)
        elif "sinks" in key or key.endswith(("_hc.base", "hc_base")):
            value.data = torch.randn_like(value)
        elif value.ndim > 1:
            value.data = torch.randn_like(value) * value.shape[-1] ** -0.5
    return model


class InFloat64(TorchFunctionMode):
    """Calls that ask for float32, such as those of norms and recurrences, get float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **named)


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def exact_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """ids [T] -> logits [T, V] with all of transformers' computing in float64; the model stays in it.

    In float32 a small output of a recurrent layer, divided by its own norm, magnifies their rounding, so
    that their two forms of the recurrence differ by more than ours from either.
    """
    model.double()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # the grouped product knows no float64
    with InFloat64():
        logits: torch.Tensor = model(input_ids=ids[None]).logits[0]
    assert logits.dtype is torch.float64
    return logits


def save(name: str, model: Any, path: Path, published: bool = True) -> None:
    """Save as transformers does; published: with the names of published checkpoints, if they differ."""
    model.save_pretrained(path)
    if name == "kimi_k25" and published:
        _as_published(path)


def _as_published(path: Path) -> None:
    """transformers saves Kimi's layers as `language_model.model.blocks`; published files have `layers`."""
    file = path / "model.safetensors"
    tensors = {
        k.replace("language_model.model.blocks", "language_model.model.layers"): v.clone()
        for k, v in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
