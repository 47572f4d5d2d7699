"""Energy meters against a fake powercap tree and a fake NVML."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from farthing.cost import EstimatedMeter, Hardware, Machine, NvmlMeter, RaplMeter, open_meter

CPU = Machine(Hardware(name="cpu", kind="cpu", usd_per_hour=1, watts=5, idle_watts=2), 4)
GPU = Machine(Hardware(name="gpu", kind="gpu", usd_per_hour=1, watts=700, idle_watts=70, host_watts=100), 2)


def powercap(root: Path, zones: dict[str, tuple[str, int]]) -> None:
    for zone, (name, energy) in zones.items():
        path = root / zone
        path.mkdir(parents=True)
        (path / "name").write_text(name + "\n")
        (path / "energy_uj").write_text(f"{energy}\n")
        (path / "max_energy_range_uj").write_text("1000000\n")


def nvml(monkeypatch: pytest.MonkeyPatch, counters: list[int]) -> None:
    class NVMLError(Exception):
        pass

    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(counters),
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTotalEnergyConsumption=lambda device: counters[device],
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_rapl_sums_packages_and_memory_and_handles_wraparound(tmp_path: Path) -> None:
    powercap(
        tmp_path,
        {
            "intel-rapl:0": ("package-0", 999_000),
            "intel-rapl:0:0": ("core", 5),  # part of the package
            "intel-rapl:0:1": ("dram", 10),
        },
    )
    meter = RaplMeter(tmp_path)
    assert meter.joules(0, 0) == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("4000")  # wrapped: 5,000 µJ later
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("900000")
    (tmp_path / "intel-rapl:0:1" / "energy_uj").write_text("2010")
    assert meter.joules(1, 1) == pytest.approx(0.007)
    assert open_meter(CPU, root=tmp_path).source == "rapl"


def test_estimate_is_labelled_without_counters(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RaplMeter(tmp_path)
    meter = open_meter(CPU, root=tmp_path)
    assert meter.source == "estimated"
    assert meter.joules(10, 4) == pytest.approx(4 * 20 + 6 * 8)


def test_nvml_counts_from_opening_and_the_host_is_estimated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counters = [5_000, 7_000]
    nvml(monkeypatch, counters)
    meter = open_meter(GPU, root=tmp_path)
    assert meter.source == "nvml+estimated"
    counters[:] = [6_000, 9_500]
    assert meter.joules(2, 1) == pytest.approx(3.5 + 2 * 200)
    assert NvmlMeter([1]).joules(0, 0) == 0


def test_nvml_and_rapl_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml(monkeypatch, [0])
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 0)})
    assert open_meter(GPU, root=tmp_path).source == "nvml+rapl"


def test_a_failing_nvml_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml(monkeypatch, [0])
    module = sys.modules["pynvml"]

    def fail(device: int) -> int:
        raise module.NVMLError("not supported")

    monkeypatch.setattr(module, "nvmlDeviceGetTotalEnergyConsumption", fail)
    with pytest.raises(RuntimeError, match="not supported"):
        NvmlMeter()
    assert isinstance(open_meter(GPU, root=tmp_path), EstimatedMeter)
    assert open_meter(GPU, root=tmp_path).joules(3, 1) == pytest.approx(1600 + 2 * 340)
