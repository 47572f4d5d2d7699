"""Hourly price and power draw of machines: declared figures that a user can override."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["cpu", "gpu"]
ENVIRONMENT = "FARTHING_PRICES"
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One unit of hardware (a vCPU, a GPU, or a whole machine): its declared price and power."""

    name: str
    kind: Kind
    usd_per_hour: float
    watts: float  # power when busy
    idle_watts: float
    host_watts: float = 0.0  # a GPU's share of the host
    match: tuple[str, ...] = ()  # substrings of device names, lower case
    units: Literal["unit", "machine"] = "unit"
    note: str = ""

    def __post_init__(self) -> None:
        where = f"hardware.{self.name}"
        if self.kind not in ("cpu", "gpu"):
            raise ValueError(f"{where}.kind: got {self.kind!r}; expected 'cpu' or 'gpu'")
        if self.units not in ("unit", "machine"):
            raise ValueError(f"{where}.units: got {self.units!r}; expected 'unit' or 'machine'")
        for field in ("usd_per_hour", "watts", "idle_watts", "host_watts"):
            _check_number(f"{where}.{field}", getattr(self, field))
        if self.idle_watts > self.watts:
            raise ValueError(
                f"{where}.idle_watts: got {self.idle_watts}; expected at most watts = {self.watts}"
            )


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` units of one hardware row, with the price per second and per joule."""

    hardware: Hardware
    count: int
    usd_per_kwh: float = 0.0
    declared: str = ""  # date of the declared figures

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: got {self.count}; expected at least one unit of {self.hardware.name}")

    @property
    def _priced(self) -> int:
        return 1 if self.hardware.units == "machine" else self.count

    @property
    def usd_per_hour(self) -> float:
        """Price of the whole machine, excluding electricity if that is priced separately."""
        return self.hardware.usd_per_hour * self._priced

    @property
    def usd_per_second(self) -> float:
        """Price of the whole machine; see `usd_per_hour`."""
        return self.usd_per_hour / 3600

    @property
    def usd_per_joule(self) -> float:
        """Price of electricity; 0 if the hourly price includes it."""
        return self.usd_per_kwh / JOULES_PER_KWH

    @property
    def watts(self) -> float:
        """Declared busy power, host included."""
        return (self.hardware.watts + self.hardware.host_watts) * self._priced

    @property
    def idle_watts(self) -> float:
        """Declared idle power, host included."""
        return (self.hardware.idle_watts + self.hardware.host_watts) * self._priced

    @property
    def host_watts(self) -> float:
        """Declared power of the GPUs' host."""
        return self.hardware.host_watts * self._priced


@dataclass(frozen=True, slots=True)
class Prices:
    """All declared hardware."""

    hardware: Mapping[str, Hardware]
    declared: str
    usd_per_kwh: float = 0.0

    @classmethod
    def load(cls, path: str | Path | None = None) -> Prices:
        """The packaged figures with the user's file on top.

        path: a file; None: $FARTHING_PRICES, else ~/.config/farthing/prices.toml if it exists.
        Raises ValueError naming the file and the field, FileNotFoundError if a named file is missing.
        """
        packaged = Path(__file__).with_name("prices.toml")
        prices = _merge(cls({}, ""), packaged)
        own = _user_file(path)
        return _merge(prices, own) if own is not None else prices

    def find(self, kind: Kind, device: str = "") -> Hardware:
        """The row that matches a device name ("NVIDIA H100 80GB HBM3"), or the kind's fallback row."""
        name = device.lower()
        rows = [h for h in self.hardware.values() if h.kind == kind]
        fitting = [(len(part), h) for h in rows for part in h.match if _names(part, name)]
        if fitting:
            return max(fitting, key=lambda item: item[0])[1]
        fallback = next((h for h in rows if not h.match), None)
        if fallback is None:
            raise ValueError(
                f"no {kind} row matches {device!r} and none has match = []; rows: {sorted(self.hardware)}"
            )
        return fallback

    def machine(self, kind: Kind, device: str = "", count: int = 1, name: str | None = None) -> Machine:
        """`count` units of row `name`, else of the row that matches `device`. ValueError: unknown name."""
        if name is not None and name not in self.hardware:
            raise ValueError(f"hardware: got {name!r}; expected one of {sorted(self.hardware)}")
        hardware = self.hardware[name] if name is not None else self.find(kind, device)
        return Machine(hardware, count, self.usd_per_kwh, self.declared)


def _names(part: str, device: str) -> bool:
    """Whether `part` occurs in `device` as whole words: "nvidia l4" does not match "nvidia l40s"."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", device) is not None


def _user_file(path: str | Path | None) -> Path | None:
    named = path or os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser()
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "farthing" / "prices.toml"
    return home if home.exists() else None


def _merge(base: Prices, path: Path) -> Prices:
    """`base` overlaid with the rows of a file; rows of the same name are merged field by field."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"prices file {path} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    try:
        return _parse(base, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(base: Prices, data: dict[str, Any]) -> Prices:
    unknown = set(data) - {"declared", "usd_per_kwh", "hardware"}
    if unknown:
        raise ValueError(f"unknown {sorted(unknown)}; expected declared, usd_per_kwh and [hardware.NAME]")
    rows = dict(base.hardware)
    for name, fields in data.get("hardware", {}).items():
        rows[name] = _row(name, fields, rows.get(name))
    usd_per_kwh = data.get("usd_per_kwh", base.usd_per_kwh)
    _check_number("usd_per_kwh", usd_per_kwh)
    return Prices(rows, str(data.get("declared", base.declared)), float(usd_per_kwh))


def _row(name: str, fields: Any, old: Hardware | None) -> Hardware:
    names = set(Hardware.__dataclass_fields__) - {"name"}
    if not isinstance(fields, dict) or set(fields) - names:
        raise ValueError(f"hardware.{name}: got {fields!r}; expected a table of {sorted(names)}")
    merged = {field: getattr(old, field) for field in names} if old is not None else {}
    merged |= fields
    missing = {"kind", "usd_per_hour", "watts", "idle_watts"} - set(merged)
    if missing:
        raise ValueError(f"hardware.{name} lacks {sorted(missing)}")
    match = merged.get("match", ())
    if isinstance(match, str) or not all(isinstance(part, str) and part for part in match):
        raise ValueError(f"hardware.{name}.match: got {match!r}; expected a list of strings")
    return Hardware(name=name, **merged | {"match": tuple(part.lower() for part in match)})


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value!r}; expected a number, 0 or more")
