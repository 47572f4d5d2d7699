"""Fields of a config.json whose first two of three layers are dense."""

from typing import Any

QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "mlp_only_layers": [0, 1],
}  # fmt: skip
