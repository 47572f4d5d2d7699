"""The trainable architecture: DeepSeek-V3's, described by the engine's `ModelConfig`."""

from __future__ import annotations

import dataclasses
from typing import Any

from farthing.model.config import ConfigError, ModelConfig, RopeConfig, check_config

# Fields of DeepSeek-V3's config.json with fixed values here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "router_bias": (True,),
    "moe_layer_freq": (1,),
    "num_nextn_predict_layers": (0, 1),
}
# Fields that DeepSeek's config.json lacks or names differently.
_OTHER = {
    *("rope", "query_scaling", "attention", "router_bias", "post_mlp_norm", "unrotated", "dense_layers"),
    *("embedding_scale", "logit_scale"),
    *("index_rope_interleaved", "indexer_types", "n_identity_experts", "shortcut_experts"),
    *("shared_intermediate_size", "layer_sizes", "eos_token_ids"),
}


def check_trainable(cfg: ModelConfig) -> None:
    """Raise ConfigError with the field whose value the training model does not implement."""
    for name, accepted in _FIXED.items():
        if getattr(cfg, name) not in accepted:
            words = " or ".join(map(repr, accepted))
            raise ConfigError(f"{name}: got {getattr(cfg, name)!r}; expected {words} for training")
    needed = {"q_lora_rank": cfg.latent.q_lora_rank, "n_routed_experts": cfg.n_routed_experts}
    for name, value in needed.items():
        if not value:
            raise ConfigError(f"{name}: got {value!r}; expected a positive integer for training")
    dense = dataclasses.replace(cfg, index_topk=None)
    if not dense.is_v3 or cfg.indexer_types or cfg.index_rope_interleaved:
        raise ConfigError(
            f"model_type: got {cfg.model_type!r}; expected DeepSeek-V3's or V3.2's layers for training"
        )
    if cfg.rope != RopeConfig(theta=cfg.rope.theta):
        raise ConfigError("rope_scaling is set; expected plain interleaved RoPE for training")
    for layer in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        check_config(cfg.at(layer))


def to_json(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that describe a trainable architecture, for `ModelConfig.from_json`."""
    fields: dict[str, Any] = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in _OTHER}
    scales = ("query_latent_scale", "latent_scale")  # of other types
    fields |= {k: v for k, v in dataclasses.asdict(cfg.latent).items() if k not in scales}
    fields |= {"rope_theta": cfg.rope.theta, "rope_scaling": None, "eos_token_id": cfg.eos_token_ids[0]}
    if cfg.index_topk is None:
        fields = {k: v for k, v in fields.items() if not k.startswith("index_")}
    if cfg.shared_intermediate_size is not None:
        fields["shared_intermediate_size"] = cfg.shared_intermediate_size
    if cfg.layer_sizes:
        fields["layer_sizes"] = [
            {k: v for k, v in dataclasses.asdict(sizes).items() if v is not None} for sizes in cfg.layer_sizes
        ]
    return fields
