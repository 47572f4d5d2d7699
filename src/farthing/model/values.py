"""Checked reads of config.json. Every error names the field, its value and what is accepted.

Booleans are no integers, and sizes have an upper bound, so that a typing error is reported instead of
exhausting memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from reprlib import Repr
from typing import Any

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
    """A required integer. within: the object that has the field, for messages."""
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
