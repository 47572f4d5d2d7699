"""What depends on positions: rotary embedding and query scale, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from farthing.model import values as checked
from farthing.model.values import MOST, absent, optional_section, wrong


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: plain, or scaled by a factor: with YaRN (Peng et al. 2023), linearly, as Llama 3."""

    theta: float = 10000.0
    factor: float | None = None
    kind: Literal["yarn", "linear", "llama3"] = "yarn"  # with a factor
    # llama3: a pair is scaled by all of the factor below that many turns in the original context, and by none
    low_frequency: float = 1.0
    high_frequency: float = 4.0  # of it above that many
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # whether the range of pairs between the two betas is rounded to whole pairs
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # scale of cos and sin; None: computed from the two fields above
    interleaved: bool = True


@dataclass(frozen=True, slots=True)
class QueryScaling:
    """Position-dependent query scale: q (1 + beta ln(1 + floor(position / original_max_position)))."""

    beta: float
    original_max_position: int


def read_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """From `rope_parameters` or `rope_scaling`. Raises ValueError naming the field."""
    name = next((n for n in ("rope_parameters", "rope_scaling") if raw.get(n)), "rope_scaling")
    p = optional_section(raw, name)
    kind = p.get("rope_type", p.get("type", "default"))
    if kind not in ("default", "yarn", "linear", "llama3"):
        raise wrong(
            f"{name}.{'rope_type' if 'rope_type' in p else 'type'}",
            kind,
            "'yarn', 'llama3', 'linear' or no rope_scaling",
        )
    theta = checked.number(
        *(
            (f"{name}.rope_theta", p["rope_theta"])
            if "rope_theta" in p
            else ("rope_theta", raw.get("rope_theta", 1e4))
        ),
        above=0.0,
    )
    interleaved = checked.flag("rope_interleave", raw.get("rope_interleave", True))
    if kind == "default":
        return RopeConfig(theta=theta, interleaved=interleaved)

    def read(field: str, default: float, above: float = 0.0) -> float:
        value = p.get(field)
        return default if value is None else checked.number(f"{name}.{field}", value, above)

    if "factor" not in p:
        raise absent(f"{name}.factor", "a number greater than 0")
    original = p.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return RopeConfig(
        theta=theta,
        factor=checked.number(f"{name}.factor", p["factor"], above=0.0),
        kind=kind,
        low_frequency=read("low_freq_factor", 1.0),
        high_frequency=read("high_freq_factor", 4.0),
        original_max_position=checked.in_range(
            f"{name}.original_max_position_embeddings", original, 1, MOST["max_position_embeddings"]
        ),
        beta_fast=read("beta_fast", 32.0),
        beta_slow=read("beta_slow", 1.0),
        truncate=True if p.get("truncate") is None else checked.flag(f"{name}.truncate", p["truncate"]),
        mscale=read("mscale", 0.0, -1e-9),
        mscale_all_dim=read("mscale_all_dim", 0.0, -1e-9),
        attention_factor=None if p.get("attention_factor") is None else read("attention_factor", 1.0),
        interleaved=interleaved,
    )


def read_query_scaling(raw: Mapping[str, Any]) -> QueryScaling | None:
    """From `rope_parameters`; None: queries are not scaled. Raises ValueError naming the field."""
    rope = optional_section(raw, "rope_parameters")
    beta = rope.get("llama_4_scaling_beta")
    if beta is None:
        return None
    name = "rope_parameters."
    return QueryScaling(
        checked.number(f"{name}llama_4_scaling_beta", beta),
        checked.integer(rope, "original_max_position_embeddings", within=name),
    )
