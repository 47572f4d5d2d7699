"""Adaptive experts: the number of experts per token follows the gate's confidence, up to the model's top_k.

`adaptive:p[,min=2,max=8]` keeps, for each token, the fewest experts whose normalized gate weights reach p.
A checkpoint calibrated for it has one p per layer in config.json, under "adaptive_experts".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from farthing.model.config import ConfigError, ModelConfig
from farthing.model.decoder import routers_of
from farthing.ops import RouterSpec

EXPECTED = "expected 'auto', 'all' or 'adaptive:p[,min=2,max=8]' with 0 < p <= 1"


@dataclass(frozen=True, slots=True)
class AdaptiveExperts:
    """mass[i] for layer i (MTP layers included), or one value for all of them."""

    mass: tuple[float, ...]
    min_experts: int = 2
    max_experts: int | None = None

    def __post_init__(self) -> None:
        for p in self.mass:
            if not 0 < p <= 1:
                raise ConfigError(f"adaptive experts: p: got {p}; expected 0 < p <= 1")
        if self.min_experts < 1:
            raise ConfigError(f"adaptive experts: min: got {self.min_experts}; expected at least 1")
        if self.max_experts is not None and self.max_experts < self.min_experts:
            raise ConfigError(
                f"adaptive experts: max: got {self.max_experts}; expected at least min = {self.min_experts}"
            )

    @classmethod
    def parse(cls, text: str) -> AdaptiveExperts | None:
        """'all' -> None; 'adaptive:0.9,min=2,max=6' -> the rule. Raises ConfigError."""
        if text == "all":
            return None
        kind, _, rest = text.partition(":")
        first, *options = rest.split(",")
        try:
            if kind != "adaptive":
                raise ValueError
            mass = float(first)
            named = {k.strip(): int(v) for k, _, v in (o.partition("=") for o in options)}
        except ValueError:
            raise ConfigError(f"experts: got {text!r}; {EXPECTED}") from None
        if unknown := set(named) - {"min", "max"}:
            raise ConfigError(f"experts: option {sorted(unknown)[0]!r} is unknown; {EXPECTED}")
        return cls((mass,), named.get("min", 2), named.get("max"))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AdaptiveExperts | None:
        """The rule in a config.json, if any."""
        rule = raw.get("adaptive_experts")
        if rule is None:
            return None
        try:
            return cls(tuple(float(p) for p in rule["mass"]), int(rule["min"]), int(rule["max"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"config.json: adaptive_experts: got {rule!r}; expected {{mass: [p per layer], min, max}}"
            ) from error

    def to_json(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse of `from_json`."""
        most = self.max_experts or config.num_experts_per_tok
        return {"adaptive_experts": {"mass": list(self.mass), "min": self.min_experts, "max": most}}

    def routers(self, config: ModelConfig) -> list[RouterSpec | None]:
        """The routers of every layer under this rule."""
        specs = routers_of(config)
        if len(self.mass) not in (1, len(specs)):
            raise ConfigError(
                f"adaptive experts: {len(self.mass)} values of p; "
                f"expected 1 or one for each of {len(specs)} layers"
            )
        masses = self.mass if len(self.mass) > 1 else self.mass * len(specs)
        most = min(self.max_experts or config.num_experts_per_tok, config.num_experts_per_tok)
        return [
            s and replace(s, top_k=most, mass=p, min_experts=min(self.min_experts, most))
            for s, p in zip(specs, masses, strict=True)
        ]


def routers_for(config: ModelConfig, raw: Mapping[str, Any], experts: str) -> list[RouterSpec | None]:
    """The routers for `--experts`: 'auto' follows config.json, else see `AdaptiveExperts.parse`."""
    rule = AdaptiveExperts.from_json(raw) if experts == "auto" else AdaptiveExperts.parse(experts)
    return rule.routers(config) if rule else routers_of(config)
