"""Small models and texts for the trainer's tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from farthing.train.model import ModelConfig

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    max_position_embeddings=128,
)


@pytest.fixture
def tiny() -> ModelConfig:
    """A model of a few ten thousand parameters with every part of the architecture."""
    return TINY


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of 60 small different Python files, one exact copy and one near copy."""
    rng = random.Random(0)
    root = tmp_path / "sources"
    root.mkdir()
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for i in range(60):
        lines = []
        for _ in range(20):
            a, b = rng.choice(words), rng.choice(words)
            lines.append(
                f"def {a}_{b}_{i}_{rng.randrange(1000)}(x):\n    return x + {rng.randrange(10**6)}\n"
            )
        (root / f"module_{i:02}.py").write_text("\n".join(lines))
    original = (root / "module_00.py").read_text()
    (root / "copy_exact.py").write_text(original)
    (root / "copy_near.py").write_text(original + "# one more line at the end of the file\n")
    return root
