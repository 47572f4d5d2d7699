"""What the accuracy gate loads and what it asks."""

from __future__ import annotations

from pathlib import Path

from farthing.compress.simulate import SimulatedOps
from farthing.model import DeepseekModel, load
from farthing.ops import select


def held_out_sample() -> Path:
    """The embedded model's held-out text."""
    return Path(__file__).parents[1] / "models" / "reference" / "heldout.jsonl"


def parse_share(name: str, text: str) -> float:
    """'0.3%' or '0.003' -> 0.003. Raises ValueError naming the option."""
    value = text.strip()
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 10:
        raise ValueError(f"{name} is {text!r}; expected a share such as 0.3% or 0.003")
    return share


def load_for(path: Path, backend: str = "auto", simulate: bool = False) -> DeepseekModel:
    """A model to measure: on a serving backend, or in float32 with simulated activation rounding."""
    return load(path, SimulatedOps(path) if simulate else select(backend))
