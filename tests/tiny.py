"""Model configurations of the tests, in config.json's format: published, miniature and tiny."""

from __future__ import annotations

from typing import Any

# DeepSeek-V3 as published.
V3: dict[str, Any] = dict(
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    max_position_embeddings=163840,
    rope_theta=10000,
    rope_scaling=dict(
        type="yarn",
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    bos_token_id=0,
    eos_token_id=1,
)

# A miniature V3: grouped routing, YaRN and an MTP layer, like the published one.
SMALL_V3: dict[str, Any] = V3 | dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    max_position_embeddings=64,
)

# A miniature LongCat-Flash: every second layer has six experts and three identities.
LONGCAT: dict[str, Any] = dict(
    model_type="longcat_flash",
    vocab_size=40,
    hidden_size=64,
    ffn_hidden_size=64,
    expert_ffn_hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=6,
    zero_expert_num=3,
    moe_topk=3,
    routed_scaling_factor=6.0,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
)

# A small GLM-4.5: groups of two heads, biases, a norm per head, half of a head rotated; V3's experts and MTP.
GLM4: dict[str, Any] = dict(
    model_type="glm4_moe",
    vocab_size=40,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    attention_bias=True,
    use_qk_norm=True,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=1,
    max_position_embeddings=2048,
)

# A small Qwen3-Next: two layers of Gated DeltaNet around gated attention, and a shared expert with a gate.
QWEN3_NEXT: dict[str, Any] = dict(
    model_type="qwen3_next",
    vocab_size=40,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    attention_bias=True,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
    num_experts=6,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    max_position_embeddings=2048,
)

# A small gpt-oss: a window in two of three layers, sinks, biases everywhere, a clamped gate.
GPT_OSS: dict[str, Any] = dict(
    model_type="gpt_oss",
    vocab_size=40,
    hidden_size=64,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=6,
    num_experts_per_tok=2,
    sliding_window=9,
    swiglu_limit=1.5,
    max_position_embeddings=2048,
)

# A small DeepSeek-V4: a window alone, a compressed past of two rates, the first layer's experts looked up.
DEEPSEEK_V4: dict[str, Any] = dict(
    model_type="deepseek_v4",
    vocab_size=40,
    hidden_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=24,
    qk_rope_head_dim=8,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=12,
    sliding_window=10,
    layer_types=[
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "sliding_attention",
        "compressed_sparse_attention",
    ],
    compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
    rope_scaling={"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64},
    index_n_heads=24,
    index_head_dim=16,
    index_topk=3,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=2,
    num_hash_layers=1,
    swiglu_limit=2.0,
    hc_mult=4,
    max_position_embeddings=2048,
)


def tiny(**changes: Any) -> dict[str, Any]:
    """One dense layer and one of four experts, plain RoPE, no groups, no MTP layer; updated by `changes`."""
    return (
        dict(
            model_type="deepseek_v3",
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            first_k_dense_replace=1,
            num_attention_heads=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
        )
        | changes
    )
