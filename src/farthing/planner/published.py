"""Configurations of released models by name, as package data, to plan before downloading a model."""

from __future__ import annotations

import json
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

from farthing.ops.weights import FP8_BLOCK
from farthing.planner.footprint import FLOAT_BYTES, Stored

_CONFIGS = Path(__file__).parents[1] / "assets" / "configs"
# Later releases with the architecture of an earlier one, according to their model cards.
SAME = {
    "deepseek-v3-0324": "deepseek-v3",
    "deepseek-r1-0528": "deepseek-r1",
    "deepseek-v3.1-terminus": "deepseek-v3.1",
    "deepseek-v3.2-exp": "deepseek-v3.2",
    "deepseek-v3.2-speciale": "deepseek-v3.2",
    "kimi-k2.6": "kimi-k2.5",
    "kimi-k2-instruct": "kimi-k2",
    "glm-5.1": "glm-5",
    "glm-4.7": "glm-4.6",
    "qwen3-coder-30b-a3b": "qwen3-30b-a3b-2507",
    "llama-3.3-70b": "llama-3.1-70b",
}
_UNSUPPORTED = ("deepseek-v4",)  # known names whose architecture is not served


def published() -> list[str]:
    """Names accepted by `published_config`."""
    return sorted([*SAME, *(file.stem for file in _CONFIGS.glob("*.json"))])


def published_config(name: str) -> dict[str, Any] | None:
    """The config.json of a released model such as 'deepseek-v3' or 'kimi-k2.5'; None for other names."""
    if name.lower() not in published():
        return None
    file = _CONFIGS / f"{SAME.get(name.lower(), name.lower())}.json"
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return raw


def closest(name: str) -> str:
    """A hint for an unknown name: all known names and the closest match."""
    close = get_close_matches(name.lower(), published(), n=1, cutoff=0.75)
    hint = f"; the closest is {close[0]!r}" if close else ""
    family = next((known for known in _UNSUPPORTED if name.lower().startswith(known)), None)
    refused = f"{family} is not supported; " if family else ""
    return f"{refused}published configurations: {', '.join(published())}{hint}"


def file_bytes(stored: Stored, shape: tuple[int, ...]) -> int:
    """Bytes of a parameter in a checkpoint's files, scales included."""
    count = prod(shape)
    if stored.is_float or len(shape) < 2:
        return count * (FLOAT_BYTES[stored.kind] if stored.is_float else 2)
    if stored.kind == "fp8":
        return count + 4 * prod(-(-n // FP8_BLOCK) for n in shape)
    if stored.kind == "int8":
        return count + 4 * shape[0]
    groups = shape[0] * -(-shape[1] // stored.group)
    return count // 2 + groups * (3 if stored.zero else 2)
