"""Accounts: totals are conserved for any order of events, and figures match manual calculation."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import farthing.cost
from farthing.cost.meter import (
    OTHER,
    CostMeter,
    CostReport,
    EstimatedMeter,
    NvmlMeter,
    RaplMeter,
    Spend,
    Usage,
    open_meter,
    samples,
    usage_extension,
)
from farthing.cost.prices import Hardware, Machine

MACHINE = Machine(
    Hardware(name="box", kind="cpu", usd_per_hour=3.6, watts=10, idle_watts=4), 2, 0.36, "today"
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Counter:
    """A meter whose joules are set by the test."""

    source = "rapl"
    total = 0.0

    def joules(self, wall_seconds: float, busy_seconds: float) -> float:
        return self.total


def conserved(report: CostReport) -> None:
    spent = report.requests.spend
    for name in ("seconds", "joules", "usd"):
        parts = [getattr(s, name) for s in (spent, report.idle, report.pending)]
        assert all(part >= -1e-9 for part in parts), (name, parts)
        assert sum(parts) == pytest.approx(getattr(report.total, name), rel=1e-9, abs=1e-9), name


EVENT = st.tuples(
    st.floats(0, 100),  # elapsed seconds
    st.floats(0, 1.5),  # busy share (the engine's clock may run ahead)
    st.floats(0, 500),  # joules used
    st.one_of(st.none(), st.tuples(st.floats(0, 60), st.floats(0, 60), st.integers(0, 3))),
)


@given(st.lists(EVENT, max_size=40))
def test_totals_are_conserved(
    events: list[tuple[float, float, float, tuple[float, float, int] | None]],
) -> None:
    clock, energy, busy = Clock(), Counter(), 0.0
    meter = CostMeter(MACHINE, energy, clock)
    for passed, share, joules, request in events:
        clock.now += passed
        busy += passed * share
        energy.total += joules
        if request is None:
            meter.observe(busy)
        else:
            prefill, decode, key = request
            cost = meter.record(
                Usage(prefill_seconds=prefill, decode_seconds=decode, decode_tokens=1), busy, "m", f"k{key}"
            )
            assert cost.usd_with_idle >= cost.usd * (1 - 1e-9)
        conserved(meter.report(busy))
    report = meter.report(busy)
    assert report.total.seconds == pytest.approx(clock.now)
    assert report.total.joules == pytest.approx(energy.total)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 1)), min_size=1, max_size=20))
def test_the_estimate_charges_declared_watts(steps: list[tuple[float, float]]) -> None:
    clock, busy = Clock(), 0.0
    meter = CostMeter(MACHINE, EstimatedMeter(MACHINE.watts, MACHINE.idle_watts), clock)
    for passed, share in steps:
        clock.now += passed
        busy += passed * share
        meter.observe(busy)
    report = meter.report(busy)
    assert report.idle.joules == pytest.approx(MACHINE.idle_watts * (clock.now - busy), abs=1e-6)
    assert report.pending.joules == pytest.approx(MACHINE.watts * busy, abs=1e-6)


def hour() -> tuple[CostMeter, Clock]:
    clock = Clock()
    meter = CostMeter(MACHINE, EstimatedMeter(MACHINE.watts, MACHINE.idle_watts), clock)
    clock.now = 100.0  # 40 s busy: 10 prefill, 20 decode of one request, 10 of one still running
    return meter, clock


def test_one_request_matches_manual_calculation() -> None:
    meter, _ = hour()
    usage = Usage(
        prefill_tokens=100, cached_tokens=50, decode_tokens=20, prefill_seconds=10, decode_seconds=20
    )
    cost = meter.record(usage, 40.0, "m", "alice")
    # two units: 7.2 USD and 20 W busy; 0.36 USD per kWh = 1e-7 USD per joule
    seconds = (cost.account.prefill.seconds, cost.account.decode.seconds)
    assert seconds == pytest.approx((10, 20))
    assert cost.account.spend.joules == pytest.approx(30 * 20)
    assert cost.usd == pytest.approx(30 * 0.002 + 600 * 1e-7)
    assert cost.usd_with_idle == pytest.approx(cost.usd / 0.4)
    assert cost.account.saved_usd == pytest.approx(50 * cost.account.prefill.usd / 100)
    report = meter.report(40.0)
    assert report.pending == Spend(10.0, pytest.approx(200.0), pytest.approx(10 * 0.002 + 200 * 1e-7))
    assert report.idle.seconds == 60 and report.utilization == pytest.approx(0.4)
    assert report.usd_per_million_tokens == pytest.approx(report.total.usd / 170 * 1e6)
    assert report.usd_per_million_output_tokens == pytest.approx(report.total.usd / 20 * 1e6)


def test_a_meter_that_is_read_within_a_step_leaves_nothing_pending() -> None:
    clock = Clock()
    meter = CostMeter(MACHINE, EstimatedMeter(MACHINE.watts, MACHINE.idle_watts), clock)
    clock.now = 9.0  # a step that began at 0 still runs
    meter.observe(0.0)
    clock.now = 10.0
    cost = meter.record(Usage(prefill_seconds=2.5, decode_seconds=7.5, decode_tokens=1), 10.0, "m", "alice")
    assert cost.account.spend.seconds == pytest.approx(1.0)  # what has been observed of the step
    clock.now = 30.0
    report = meter.report(10.0)
    account = report.accounts["m", "alice"]
    assert (account.prefill.seconds, account.decode.seconds) == pytest.approx((2.5, 7.5))
    assert report.pending.seconds == pytest.approx(0.0, abs=1e-9)
    conserved(report)


def test_usage_extension_adds_up_and_is_plain_json() -> None:
    meter, _ = hour()
    cost = meter.record(Usage(prefill_tokens=3, prefill_seconds=1, decode_seconds=2), 40.0)
    shown = usage_extension(cost)
    assert shown["usd"] == pytest.approx(shown["prefill"]["usd"] + shown["decode"]["usd"])
    assert shown["cpu_seconds"] == pytest.approx(2 * 3.0)
    assert shown["joules_source"] == "estimated" and shown["hardware"] == "box"
    assert shown["cached"] == {"tokens": 0, "saved_usd_estimated": 0.0}


def test_samples_split_by_key_model_and_phase_and_add_up() -> None:
    meter, _ = hour()
    meter.record(Usage(prefill_seconds=4, decode_seconds=6, decode_tokens=5), 40.0, "m", "alice")
    meter.record(Usage(prefill_seconds=1, decode_seconds=9, cached_tokens=7), 40.0, "m", "bob")
    report = meter.report(40.0)
    found = list(samples(report))
    usd = {(s.labels["api_key"], s.labels["phase"]): s.value for s in found if s.name == "farthing:cost_usd"}
    assert set(usd) == {(k, p) for k in ("alice", "bob") for p in ("prefill", "decode")} | {("", "idle")}
    assert sum(usd.values()) + report.pending.usd == pytest.approx(report.total.usd)
    assert {s.labels["source"] for s in found if s.name == "farthing:cost_joules"} == {"estimated"}
    names = [s.name for s in found]
    assert names == sorted(names, key=names.index), "samples of one name must be next to each other"
    assert all(names.index(n) + names.count(n) - 1 == len(names) - 1 - names[::-1].index(n) for n in names)


def test_accounts_are_bounded() -> None:
    clock = Clock()
    meter = CostMeter(MACHINE, EstimatedMeter(1, 1), clock, max_accounts=2)
    for key in ("a", "b", "c", "d"):
        meter.record(Usage(decode_tokens=1), 0.0, "m", key)
    accounts = meter.report(0.0).accounts
    assert {key for _, key in accounts} == {"a", "b", OTHER}
    assert accounts["m", OTHER].requests == 2


def test_invalid_usage_is_rejected() -> None:
    with pytest.raises(ValueError, match="decode_seconds: got -1"):
        Usage(decode_seconds=-1)
    with pytest.raises(ValueError, match="prefill_seconds: got nan"):
        Usage(prefill_seconds=float("nan"))


def test_cost_imports_nothing_of_the_rest() -> None:
    for file in Path(farthing.cost.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("farthing"):
                assert (node.module or "").startswith("farthing.cost"), (file.name, node.module)


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
