"""Kernel launch configurations from files, and device properties."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton.runtime import driver

from farthing.ops.gpu.numeric import INTERPRETED

FOLDER = Path(__file__).parent / "configs"
_INTERPRETED_PROGRAMS = 3  # few and odd, so that persistent loops iterate in tests
_SMALLER = re.compile(r"shared-(\d+)k\.json")  # for GPUs with at most this much shared memory, in KiB
_TILE = {"bm", "bn", "bk"}


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes and resources of one launch. Fields that a kernel does not use keep their default."""

    bm: int = 64
    bn: int = 64
    bk: int = 64
    num_warps: int = 4
    num_stages: int = 3
    per_processor: int = 1  # concurrent programs per multiprocessor: persistent kernels and decode

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            power = isinstance(value, int) and value > 0 and value & (value - 1) == 0
            if field.name == "num_stages":
                power = isinstance(value, int) and 1 <= value <= 8
            if not power or (field.name in _TILE and value < 16):
                raise ValueError(
                    f"{field.name}: got {value!r}; expected "
                    f"{'1 to 8' if field.name == 'num_stages' else 'a power of two'}"
                    f"{', at least 16' if field.name in _TILE else ''}"
                )

    @property
    def resources(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def file_name(device: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3.json'."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read_configs(path: Path) -> dict[str, list[tuple[int, Config]]]:
    """kernel -> (maximum rows, configuration), ascending.

    File format: {kernel: [{"rows": 16, "bm": 16, …}, …]}; a kernel's last entry covers all larger sizes.
    Raises ValueError naming file, kernel and field.
    """
    known = {f.name for f in fields(Config)}
    table: dict[str, list[tuple[int, Config]]] = {}
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    for kernel, entries in raw.items():
        rows = []
        for entry in entries:
            unknown = entry.keys() - known - {"rows"}
            if unknown or "rows" not in entry:
                raise ValueError(
                    f"{path.name}: {kernel} has {sorted(entry)}; expected 'rows' and some of {sorted(known)}"
                )
            try:
                rows.append((int(entry["rows"]), Config(**{k: v for k, v in entry.items() if k != "rows"})))
            except ValueError as error:
                raise ValueError(f"{path.name}: {kernel}: {error}") from error
        if not rows or [r for r, _ in rows] != sorted({r for r, _ in rows}):
            raise ValueError(
                f"{path.name}: {kernel} has rows {[r for r, _ in rows]}; expected some, ascending"
            )
        table[kernel] = rows
    return table


@dataclass(frozen=True, slots=True)
class Card:
    """The GPU properties that determine launches."""

    name: str
    processors: int
    shared: int  # maximum shared memory per program in bytes
    generation: int  # major compute capability


# Target of interpreted kernels, and of compilation without a GPU: an H100.
_NONE = Card("", _INTERPRETED_PROGRAMS if INTERPRETED else 132, 227 << 10, 9)


@cache
def table(card: Card) -> dict[str, list[tuple[int, Config]]]:
    """default.json, overridden by shared-memory and generation files, then by the GPU's measured file."""
    found = read_configs(FOLDER / "default.json")
    smaller = {int(m[1]): m[0] for path in FOLDER.iterdir() if (m := _SMALLER.fullmatch(path.name))}
    for most in sorted(smaller, reverse=True):
        if card.shared <= most << 10:
            found |= read_configs(FOLDER / smaller[most])
    for name in (f"generation-{card.generation}.json", file_name(card.name)):
        if (FOLDER / name).exists():
            found |= read_configs(FOLDER / name)
    return found


@cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Card(properties.name, properties.multi_processor_count, shared, properties.major)


def card(device: torch.device) -> Card:
    """Properties of the GPU; without one, of the target for interpretation and compilation."""
    return _card(device.index or 0) if device.type == "cuda" else _NONE


def config(kernel: str, rows: int, device: torch.device) -> Config:
    """The configuration of `kernel` for this number of rows on this device."""
    entries = table(card(device))[kernel]
    return next((c for most, c in entries if rows <= most), entries[-1][1])


def product_config(kind: str, weight: str, inputs: torch.dtype, rows: int, device: torch.device) -> Config:
    """Configuration of product `kind` by weight format. float32 inputs use no tensor cores: small tiles."""
    return config(f"{kind}_{'float32' if inputs is torch.float32 else weight}", rows, device)


def processors(device: torch.device) -> int:
    """Number of multiprocessors of the device."""
    return card(device).processors
