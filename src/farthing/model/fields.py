"""Checked reads of config.json: values, positions and scaling. Every error names the field and its value."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from reprlib import Repr
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """This engine cannot serve a config.json; the message names the field, its value and what is accepted."""


LARGEST = 2**31 - 1
_MOST_NUMBER = 1e12
MOST = {  # of fields that are loops or whole tables
    "num_hidden_layers": 4096,
    "num_layers": 2048,
    "num_nextn_predict_layers": 64,
    "n_routed_experts": 65536,
    "n_identity_experts": 65536,
    "max_position_embeddings": 2**27,
}
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def wrong(name: str, value: object, expected: str) -> ValueError:
    """The error for a field."""
    shown = "null" if value is None else _SHORT.repr(value)
    return ValueError(f"{name}: got {shown}; expected {expected}")


def absent(name: str, expected: str) -> ValueError:
    """The error for a missing field."""
    return ValueError(f"{name} is missing; expected {expected}")


def integer(raw: Mapping[str, Any], name: str, least: int = 1, within: str = "") -> int:
    """A required integer. within: the object that has the field, for messages.

    Booleans are no integers, and sizes have an upper bound, so that a typing error is reported instead of
    exhausting memory.
    """
    full, what = within + name, _range(name, least)
    if name not in raw:
        raise absent(full, what)
    return in_range(full, raw[name], least, MOST.get(name, LARGEST))


def in_range(name: str, value: object, least: int, most: int = LARGEST) -> int:
    """An integer in a range; raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise wrong(name, value, _range(name, least, most))
    return value


def _range(name: str, least: int, most: int | None = None) -> str:
    most = MOST.get(name, LARGEST) if most is None else most
    limit = f", at most {most:,}" if most < LARGEST else ""
    return ("a positive integer" if least == 1 else f"an integer of at least {least}") + limit


def number(name: str, value: object, above: float = -math.inf) -> float:
    """A finite number greater than `above`; raises ValueError."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and above < value <= _MOST_NUMBER
    if not fits:
        least = f"greater than {above:g} and" if above > -math.inf else "of"
        raise wrong(name, value, f"a number {least} at most {_MOST_NUMBER:g}")
    return float(value)  # type: ignore[arg-type]


def flag(name: str, value: object) -> bool:
    """True or false; raises ValueError."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def choice(name: str, value: object, accepted: Collection[str]) -> str:
    """One of several texts; raises ValueError."""
    if not isinstance(value, str) or value not in accepted:
        raise wrong(name, value, " or ".join(map(repr, accepted)))
    return value


def values(
    kind: type, raw: Mapping[str, Any], positive: Collection[str] = (), nullable: Collection[str] = ()
) -> dict[str, Any]:
    """Of a dataclass, the integers, numbers, flags and choices that `raw` has under the same names.

    An integer without a default is required; null is a missing field for those in `nullable` and those that
    may be None. Raises ValueError for another type or range.
    """
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        name, hint = field.name, hints[field.name]
        value, optional = raw.get(name), type(None) in get_args(hint)
        if hint is int and field.default is MISSING:
            found[name] = integer(raw, name)
        elif value is None and (name not in raw or optional or name in nullable):
            continue
        elif hint in (int, int | None):
            found[name] = in_range(name, value, int(name in positive), MOST.get(name, LARGEST))
        elif hint in (float, float | None):
            found[name] = number(name, value, above=0.0)
        elif hint is bool:
            found[name] = flag(name, value)
        elif get_origin(hint) is Literal:
            found[name] = choice(name, value, get_args(hint))
    return found


def section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A required object; raises ValueError."""
    if name not in raw:
        raise absent(name, "an object")
    return optional_section(raw, name, null=False)


def optional_section(raw: Mapping[str, Any], name: str, null: bool = True) -> Mapping[str, Any]:
    """An object; empty if it is missing or null."""
    value = raw.get(name)
    if value is None and null:
        return {}
    if not isinstance(value, Mapping):
        raise wrong(name, value, "an object")
    return value


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: plain, or scaled by a factor: with YaRN (Peng et al. 2023), linearly, as Llama 3, or
    with pairs that do not turn."""

    theta: float = 10000.0
    factor: float | None = None
    kind: Literal["yarn", "linear", "llama3", "proportional"] = "yarn"  # with a factor
    turning: float = 1.0  # proportional: share of the pairs that turn, the first ones
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


UNSCALED = RopeConfig()


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
    if kind not in ("default", "yarn", "linear", "llama3", "proportional"):
        raise wrong(
            f"{name}.{'rope_type' if 'rope_type' in p else 'type'}",
            kind,
            "'yarn', 'llama3', 'linear', 'proportional' or no rope_scaling",
        )
    theta = number(
        *(
            (f"{name}.rope_theta", p["rope_theta"])
            if "rope_theta" in p
            else ("rope_theta", raw.get("rope_theta", 1e4))
        ),
        above=0.0,
    )
    interleaved = flag("rope_interleave", raw.get("rope_interleave", True))
    if kind == "default":
        return RopeConfig(theta=theta, interleaved=interleaved)

    def read(field: str, default: float, above: float = 0.0) -> float:
        value = p.get(field)
        return default if value is None else number(f"{name}.{field}", value, above)

    if kind == "proportional":
        share = read("partial_rotary_factor", 1.0)
        return RopeConfig(theta, read("factor", 1.0), kind, turning=share, interleaved=interleaved)
    if "factor" not in p:
        raise absent(f"{name}.factor", "a number greater than 0")
    original = p.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return RopeConfig(
        theta=theta,
        factor=number(f"{name}.factor", p["factor"], above=0.0),
        kind=kind,
        low_frequency=read("low_freq_factor", 1.0),
        high_frequency=read("high_freq_factor", 4.0),
        original_max_position=in_range(
            f"{name}.original_max_position_embeddings", original, 1, MOST["max_position_embeddings"]
        ),
        beta_fast=read("beta_fast", 32.0),
        beta_slow=read("beta_slow", 1.0),
        truncate=True if p.get("truncate") is None else flag(f"{name}.truncate", p["truncate"]),
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
        number(f"{name}llama_4_scaling_beta", beta),
        integer(rope, "original_max_position_embeddings", within=name),
    )
