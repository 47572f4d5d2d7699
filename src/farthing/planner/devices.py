"""Ceilings of GPUs: declared in devices.toml, or measured by the user."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Ceilings of one GPU; 1 GB = 1e9 bytes."""

    name: str
    memory: float  # GB
    bandwidth: float  # GB/s
    fp8: float  # TFLOP/s
    bf16: float
    nvlink: float  # GB/s per direction
    network: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Shares:
    """Share of each ceiling that kernels reach."""

    dense: float
    grouped: float
    attention: float
    bandwidth: float
    network: float


def load_devices(path: Path | None = None) -> tuple[dict[str, Ceilings], Shares]:
    """The declared ceilings, overridden by the user's measurements. Raises ValueError naming the field."""
    raw = tomllib.loads(Path(__file__).with_name("devices.toml").read_text())
    devices = {name: Ceilings(name, **row) for name, row in raw["device"].items()}
    shares = dict(raw["share"])
    if path is not None:
        own = tomllib.loads(path.read_text())
        for name, row in own.get("device", {}).items():
            base = (
                {f.name: getattr(devices[name], f.name) for f in fields(Ceilings)} if name in devices else {}
            )
            devices[name] = _device(name, base | row)
        shares |= own.get("share", {})
    if set(shares) != {f.name for f in fields(Shares)} or not all(0 < s <= 1 for s in shares.values()):
        raise ValueError(f"share: got {shares}; expected {[f.name for f in fields(Shares)]}, each in (0, 1]")
    return devices, Shares(**shares)


def _device(name: str, row: Mapping[str, Any]) -> Ceilings:
    known = {f.name for f in fields(Ceilings)}
    missing = known - set(row) - {"name", "measured"}
    if missing or set(row) - known:
        raise ValueError(f"device.{name} has {sorted(row)}; expected {sorted(known - {'name', 'measured'})}")
    for key in sorted(known - {"name", "measured"}):
        value = row[key]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"device.{name}.{key}: got {value!r}; expected a number > 0")
    return Ceilings(**{**row, "name": name, "measured": True})
