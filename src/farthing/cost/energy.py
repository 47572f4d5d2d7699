"""Energy in joules, from NVML (GPUs) and RAPL (CPU packages) if present, else from declared watts.

A meter reports the joules since it was opened and their source: "nvml+rapl", "nvml+estimated" (the host is
estimated), "rapl" or "estimated". RAPL and NVML measure a whole package or board, so on a shared machine
they include the energy of other processes.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from farthing.cost.prices import Machine

log = logging.getLogger(__name__)
POWERCAP = Path("/sys/class/powercap")


class EnergyMeter(Protocol):
    """Cumulative energy since the meter was opened."""

    @property
    def source(self) -> str:
        """The source of the readings."""
        ...

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """Joules so far; arguments: total and busy seconds since opening. Never decreases."""
        ...


class EstimatedMeter:
    """Declared watts times time: `idle_watts` when idle, `watts` when busy."""

    source = "estimated"

    def __init__(self, watts: float, idle_watts: float) -> None:
        self._watts, self._idle_watts = watts, idle_watts

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """See `EnergyMeter`."""
        return self._idle_watts * (wall_seconds - busy_seconds) + self._watts * busy_seconds


class RaplMeter:
    """RAPL (running average power limit) counters of Intel and AMD, read from the kernel's powercap files.

    Covers packages and, where it is a separate zone, their memory. Counters wrap at max_energy_range_uj, so
    read at least once a minute. Raises OSError if the files are missing or unreadable (often root only).
    """

    source = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = [_RaplZone(path) for path in _rapl_zones(root)]
        if not self._zones:
            raise FileNotFoundError(f"no RAPL packages under {root}")

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """See `EnergyMeter`."""
        return sum(zone.read() for zone in self._zones) / 1e6


class _RaplZone:
    def __init__(self, path: Path) -> None:
        self._counter = path / "energy_uj"
        self._range = int((path / "max_energy_range_uj").read_text())
        self._last = int(self._counter.read_text())
        self._sum = 0

    def read(self) -> int:
        """Microjoules since the zone was opened."""
        now = int(self._counter.read_text())
        self._sum += now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return self._sum


def _rapl_zones(root: Path) -> list[Path]:
    """Packages (`intel-rapl:0`) and their memory (`intel-rapl:0:N` named dram), counted separately."""
    zones = []
    for path in sorted(root.glob("*-rapl:*")):
        name = (path / "name").read_text().strip()
        if name.startswith("package") or name == "dram":
            zones.append(path)
    return zones


class NvmlMeter:
    """The GPUs' energy counters (mJ since driver load; Volta and newer), through nvidia-ml-py.

    Raises ImportError without nvidia-ml-py, RuntimeError if NVML or the counter is missing.
    """

    source = "nvml"

    def __init__(self, indices: Sequence[int] | None = None) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        try:
            self._nvml.nvmlInit()
            every = range(self._nvml.nvmlDeviceGetCount())
            chosen = every if indices is None else indices
            self._devices = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in chosen]
            self._start = self._millijoules()
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"NVML: {error}") from error

    def _millijoules(self) -> int:
        return sum(int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(device)) for device in self._devices)

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """See `EnergyMeter`."""
        return (self._millijoules() - self._start) / 1e3


class SumMeter:
    """The sum of several meters that do not overlap."""

    def __init__(self, parts: Sequence[EnergyMeter]) -> None:
        self._parts = list(parts)

    @property
    def source(self) -> str:
        """The meters' sources, joined by +."""
        return "+".join(dict.fromkeys(part.source for part in self._parts))

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        """See `EnergyMeter`."""
        return sum(part.joules(wall_seconds, busy_seconds) for part in self._parts)


def open_meter(machine: Machine, gpus: Sequence[int] | None = None, root: Path = POWERCAP) -> EnergyMeter:
    """The best meter available. Unmetered parts are estimated and named in the source, which is logged."""
    meter = _open_gpu(machine, gpus, root) if machine.hardware.kind == "gpu" else _rapl(root)
    if meter is None:
        meter = EstimatedMeter(machine.watts, machine.idle_watts)
    log.info("energy: %s", meter.source)
    return meter


def _open_gpu(machine: Machine, gpus: Sequence[int] | None, root: Path) -> EnergyMeter | None:
    with contextlib.suppress(ImportError, RuntimeError):
        devices: EnergyMeter = NvmlMeter(gpus)
        host = _rapl(root) or EstimatedMeter(machine.host_watts, machine.host_watts)
        return SumMeter([devices, host])
    return None


def _rapl(root: Path) -> EnergyMeter | None:
    with contextlib.suppress(OSError, ValueError):
        return RaplMeter(root)
    return None
