"""Production estimates: rules and when they are made, state after a restart, queries to Prometheus."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.files import read
from farthing_fleet.config import FleetConfig, PolicyConfig, SignalsConfig
from farthing_fleet.controller import Controller
from farthing_fleet.estimates import TUNED, LiveEstimates, _Start, append_load, make_estimates, read_loads
from farthing_fleet.policy import Policy
from farthing_fleet.rehearsal import Pinned, Plan, Rehearsal
from farthing_fleet.run import recall
from farthing_fleet.signals_prometheus import PrometheusSource
from farthing_fleet.types import Snapshot
from tests.fleet.test_controller import Recorder, Source

DAY = 86400.0
BEGIN = 20_000 * DAY


USED = """
import sys
from pathlib import Path
import farthing_fleet.cli, farthing_fleet.run
from farthing_fleet.config import FleetConfig, PolicyConfig
from farthing_fleet.estimates import make_estimates
from farthing_fleet.types import Snapshot
estimates = make_estimates(FleetConfig(PolicyConfig(capacity=1.0), state=Path(sys.argv[1])))
for now in (0.0, 60.0, 120.0):
    estimates.observe(now, Snapshot(now, 8, 8, request_rate=6.0, backlog=0.0, queue_time_s=0.0))
    estimates.maintain(now)
assert estimates.plan(120.0) is not None
absent = "aiohttp torch pandas prophet matplotlib scipy starlette farthing_fleet.gateway.server"
print([name for name in absent.split() if name in sys.modules])
"""


def test_controller_loads_no_forecaster_and_no_gateway(tmp_path: Path) -> None:
    command = [sys.executable, "-c", USED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def config(tmp_path: Path, **more: object) -> FleetConfig:
    return read(FleetConfig, {"policy": {"capacity": 1.0}, "state": str(tmp_path / "state"), **more})


def observe(estimates: LiveEstimates, begin: float, seconds: int, rate: float, step: int = 15) -> None:
    for second in range(0, seconds, step):
        now = begin + second
        estimates.observe(now, Snapshot(time=now, current=20, ready=20, request_rate=rate))
        estimates.maintain(now)


def test_restart_restores_the_load(tmp_path: Path) -> None:
    first = make_estimates(config(tmp_path))
    observe(first, BEGIN, 600, 7.0)
    plan = first.plan(BEGIN + 600)
    assert plan is not None and 7.0 <= plan.load < 10.0 and plan.need >= 7.0
    second = make_estimates(config(tmp_path))
    assert second.remembers_until == BEGIN + 480  # the last complete minute
    assert second.plan(BEGIN + 600) is None  # before the first load
    observe(second, BEGIN + 600, 30, 7.0)
    plan = second.plan(BEGIN + 630)
    assert plan is not None and plan.load == pytest.approx(7.0, rel=0.3)


@pytest.mark.parametrize("interval_s", [1.0, 7.0, 15.0, 45.0, 60.0, 100.0, 240.0])
def test_a_new_rule_follows_the_past_for_as_long_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval_s: float
) -> None:
    """Whatever the step of the policy is to a minute, of which the record has one value each."""
    seen: list[float] = []
    monkeypatch.setattr(Rehearsal, "observe", lambda self, load: seen.append(load))
    estimates = make_estimates(config(tmp_path, policy={"capacity": 1.0, "interval_s": interval_s}))
    past = [float(minute) for minute in range(120)]
    estimates._following(_Start(1.0, [], 1.0, 60.0, Pinned()))  # a made-up day
    made_up = len(seen)
    estimates._following(_Start(1.0, past, 1.0, 60.0, Pinned()))
    seen = seen[2 * made_up :]
    assert 7200 <= len(seen) * interval_s < 7200 + interval_s
    assert all(load == step * interval_s // 60 for step, load in enumerate(seen))


def test_missing_signals_are_ignored(tmp_path: Path) -> None:
    estimates = make_estimates(config(tmp_path))
    for second in range(0, 600, 5):
        for gap in ({"stale": True}, {"ready": None}, {"request_rate": None}, {"request_rate": math.nan}):
            signals = {"ready": 2, "request_rate": 0.0, **gap}
            estimates.observe(BEGIN + second, Snapshot(time=BEGIN + second, current=2, **signals))  # type: ignore[arg-type]
    assert estimates.plan(BEGIN + 600) is None
    assert estimates.remembers_until is None


def test_rehearses_the_measured_cold_start(tmp_path: Path) -> None:
    """Within 20 %, and at most once an hour."""
    estimates = make_estimates(config(tmp_path))

    def cold_start(second: int, measured: float | None) -> float:
        now = BEGIN + second
        estimates.observe(now, Snapshot(now, 20, ready=20, request_rate=7.0, cold_start_s=measured))
        estimates.maintain(now)
        estimates.observe(now, Snapshot(now, 20, ready=20, request_rate=7.0, cold_start_s=measured))
        assert isinstance(estimates._rule, Rehearsal)
        return estimates._rule.settings.cold_start_s

    assert cold_start(0, None) == 600.0
    assert cold_start(3615, 660.0) == 600.0
    assert cold_start(3630, 120.0) == 120.0
    assert cold_start(3645, 600.0) == 120.0
    assert cold_start(7245, 600.0) == 600.0


def test_partial_lines_of_the_load_file_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    append_load(path, 60.0, 2.0)
    append_load(path, 0.0, 1.0)
    path.write_text(path.read_text() + "12")
    assert read_loads(path) == [(0.0, 1.0), (60.0, 2.0)]
    assert read_loads(tmp_path / "none.csv") == []
    path.write_text("0,1\n60,nan\n120,inf\nnan,1\n180,-1\n240,2\n")
    assert read_loads(path) == [(0.0, 1.0), (240.0, 2.0)]


def test_full_disk_loses_the_load_file_but_not_the_plan(tmp_path: Path) -> None:
    estimates = make_estimates(config(tmp_path))
    (tmp_path / "state" / "load.csv").symlink_to("/dev/full")
    observe(estimates, BEGIN, 600, 7.0)
    assert estimates.plan(BEGIN + 600) is not None


def test_past_is_read_from_prometheus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    async def history(
        self: PrometheusSource, unit: str, start: float, end: float, step: float
    ) -> list[tuple[float, float]]:
        asked.append((unit, end - start))
        return [(end - 60.0 * k, 3.0) for k in range(30, 0, -1)]

    monkeypatch.setattr(PrometheusSource, "load_history", history)
    fleet, source = config(tmp_path), PrometheusSource(SignalsConfig("http://127.0.0.1:9"))
    asyncio.run(recall(fleet, source, make_estimates(fleet)))
    assert asked == [("requests", pytest.approx(28 * DAY))]
    again = make_estimates(fleet)
    assert again.remembers_until is not None
    asyncio.run(recall(fleet, source, again))
    assert len(asked) == 1  # no gap to fill
    assert len(read_loads(fleet.state / "load.csv")) == 30


def test_forecast_section_is_checked(tmp_path: Path) -> None:
    events = [{"name": "sale", "dates": ["2026-11-27"]}]
    make_estimates(config(tmp_path, forecast={"prophet": {"country": "DE", "events": events}}))
    with pytest.raises(ValueError, match=r"forecast.arima: unknown field; expected one of prophet"):
        make_estimates(config(tmp_path, forecast={"arima": {}}))


def test_fleets_reach_zero_after_the_traffic_ends(tmp_path: Path) -> None:
    estimates = make_estimates(config(tmp_path, policy={"capacity": 1.0, "min_replicas": 0}))
    policy, current = Policy(PolicyConfig(capacity=1.0, min_replicas=0)), 8
    for tick in range(900):
        now = BEGIN + 15.0 * tick
        load = 2.0 + 0.2 * math.sin(tick) if tick < 360 else 0.0
        seen = Snapshot(now, current, ready=current, request_rate=load, backlog=0.0, queue_time_s=0.0)
        estimates.observe(now, seen)
        estimates.maintain(now)
        current = policy.decide(now, seen, estimates.plan(now), current=current).target
        assert current > 0 or tick > 360
    assert current == 0


def test_a_rule_is_made_outside_of_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsing takes seconds: until it is done the controller decides without, and misses no load."""
    made, go = threading.Event(), threading.Event()
    threads: list[int] = []

    class Slow(Rehearsal):
        def __init__(self, *arguments: object) -> None:
            threads.append(threading.get_ident())
            made.set()
            go.wait(60)
            super().__init__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("farthing_fleet.estimates.Rehearsal", Slow)

    async def run() -> None:
        fleet = config(tmp_path, policy={"capacity": 1.0, "interval_s": 15.0})
        source, actuator = Source(request_rate=7.0), Recorder()
        estimates = make_estimates(fleet)
        loop = Controller(
            Policy(fleet.policy),
            source,
            actuator,
            log_path=fleet.state / "d.jsonl",
            estimates=estimates,
            wall=lambda: source.time,
        )
        for _ in range(5):
            decision = await loop.turn()
            assert decision is not None and decision.target == 10 and "plan" not in decision.inputs
            source.time += 15.0
        await asyncio.to_thread(made.wait, 60)
        go.set()
        assert loop._maintenance is not None
        await loop._maintenance
        decision = await loop.turn()
        assert decision is not None and "plan" in decision.inputs
        assert isinstance(estimates._rule, Slow) and estimates._rule._steps == 6
        assert threading.get_ident() not in threads

    asyncio.run(run())


class Counts:
    """A rule that counts its steps."""

    def __init__(self, told: object, *rest: object) -> None:
        self.steps = 0

    def observe(self, load: float) -> Plan:
        self.steps += 1
        return Plan(load, load, load, 1.0, "counts")


@given(st.lists(st.sampled_from(["observe", "maintain", "lead", "tune"]), max_size=40))
def test_every_load_reaches_the_rule_in_whatever_order_rules_are_made(events: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("farthing_fleet.estimates.Rehearsal", Counts),
        mock.patch("farthing_fleet.estimates.PinnedRule", Counts),
    ):
        estimates, tuned = make_estimates(config(Path(folder))), Path(folder) / "state" / TUNED
        now, lead, since = BEGIN, 600.0, 0
        for number, event in enumerate([*events, "observe", "maintain", "observe"]):
            if event == "maintain":
                estimates.maintain(now)
                continue
            if event == "lead":
                lead, now = 2700.0 - lead, now + 3600.0
            if event == "tune":
                tuned.write_text(f'{{"utilization": 0.{50 + number}}}')
                os.utime(tuned, ns=(number + 1, number + 1))
            now, before = now + 15.0, estimates._due
            estimates.observe(now, Snapshot(now, 20, ready=20, request_rate=7.0, cold_start_s=lead))
            since = 1 if estimates._due is not before else since + 1
        assert estimates.plan(now) is not None and estimates._since is None and estimates._due is not None
        past = 4 * len(estimates._due.past)
        assert isinstance(estimates._rule, Counts) and estimates._rule.steps == past + since


@pytest.mark.parametrize("name", ["lstm", "regression"])
def test_a_chosen_forecaster_decides_without_a_trial(tmp_path: Path, name: str) -> None:
    estimates = make_estimates(config(tmp_path, policy={"capacity": 1.0, "rule": name}))
    observe(estimates, BEGIN, 900, 7.0)
    plan = estimates.plan(BEGIN + 900)
    assert plan is not None and plan.rule == name and plan.need >= 7.0 / 0.7 - 1e-6


def test_published_needs_no_plan(tmp_path: Path) -> None:
    estimates = make_estimates(config(tmp_path, policy={"capacity": 1.0, "rule": "published"}))
    observe(estimates, BEGIN, 900, 7.0)
    assert estimates.plan(BEGIN + 900) is None and estimates._due is None
    assert len(read_loads(tmp_path / "state" / "load.csv")) == 14
