"""Popular model types that are not served, by what they would need. A type that is added leaves this list."""

from __future__ import annotations

_NEEDS = {
    "form of grouped-query attention is": (
        "apertus", "arcee", "cohere", "cohere2", "dbrx", "ernie4_5", "ernie4_5_moe", "exaone4",
        "exaone_moe", "gemma2", "gemma3n", "glm4", "glm4v_moe",
        "granite", "hunyuan_v1_moe", "llama4", "llama4_text", "ministral", "olmo3", "phimoe",
        "qwen2", "qwen2_moe", "qwen3_vl_moe", "seed_oss", "starcoder2",
    ),
    "linear attention is": ("kimi_linear", "minimax", "qwen3_5"),
    "state-space layers are": (
        "bamba", "falcon_h1", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h", "zamba2",
    ),
    "Engram memory, entries and indices shared between layers, two-level index and lagged hyper-connections "
    "are": ("deepseek_v41",),
}  # fmt: skip
UNSERVED = {name: reason for reason, names in _NEEDS.items() for name in names}


def why_unserved(name: object) -> str | None:
    """What a type needs, as the subject of "... not served yet"; None for a type that is not listed."""
    return UNSERVED.get(name) if isinstance(name, str) else None
