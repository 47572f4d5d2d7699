"""`farthing fleet tune`: a choice behind no candidate, which the controller reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from farthing_fleet.cli import app
from farthing_fleet.config import FleetConfig, PolicyConfig
from farthing_fleet.estimates import TUNED, make_estimates
from farthing_fleet.rehearsal import Pinned, PinnedRule, Settings
from farthing_fleet.tune import Row, best, outcomes, tune, write
from farthing_fleet.types import Snapshot

DAY = 1440  # minutes


def fleet(state: Path, loads: np.ndarray, interval_s: float = 60.0) -> FleetConfig:
    """A controller that has recorded these loads, one a minute."""
    state.mkdir(exist_ok=True)
    (state / "load.csv").write_text("".join(f"{60 * i},{load:.6g}\n" for i, load in enumerate(loads)))
    return FleetConfig(PolicyConfig(capacity=2.0, interval_s=interval_s, cold_start_s=120.0), state=state)


def day_and_night(minutes: int) -> np.ndarray:
    wave = 12 + 8 * np.sin(np.arange(minutes) / DAY * 2 * np.pi)
    return np.asarray(wave * np.random.default_rng(7).gamma(25, 1 / 25, minutes))


def steady(minutes: int) -> np.ndarray:
    return np.full(minutes, 10.0)


@pytest.mark.parametrize("load", [day_and_night, steady])
def test_choice_is_behind_no_candidate(load: object, tmp_path: Path) -> None:
    found = tune(fleet(tmp_path, load(DAY + 60)))  # type: ignore[operator]
    assert found is not None and found.rows[0].rule == Pinned()
    needed = min(0.995, found.rows[0].share)
    assert found.chosen.share >= needed
    assert all(found.chosen.hours <= row.hours for row in found.rows if row.share >= needed)
    assert {row.rule.utilization for row in found.rows} > {0.3, 0.65, 0.73, 1.0}
    assert any(row.rule.replicas for row in found.rows)
    assert all(0 <= row.share <= 1 for row in found.rows)


@pytest.mark.parametrize("step_s", [15.0, 60.0])
def test_fleet_that_is_too_small_serves_nothing_in_time_after_its_first_hour(step_s: float) -> None:
    """Its queue grows by half of what arrives; the share is one of requests, whatever a step takes."""
    settings = replace(Settings(step_s, 120.0), most=5)
    rows = outcomes(np.full(round(DAY * 60 / step_s), 10.0), settings)
    assert all(0 <= row.share < 0.05 for row in rows)


def test_constant_load_gets_a_fleet_that_just_carries_it(tmp_path: Path) -> None:
    found = tune(fleet(tmp_path, steady(DAY)))
    assert found is not None
    assert found.chosen.share == 1.0
    assert found.chosen.hours == pytest.approx(24 * 5, abs=0.1)  # 10 requests/s, 2 per replica


def test_less_than_a_day_keeps_the_default(tmp_path: Path) -> None:
    config = fleet(tmp_path / "state", steady(DAY - 1))
    assert tune(config) is None
    file = tmp_path / "fleet.yaml"
    file.write_text(f"policy: {{capacity: 2, interval_s: 60}}\nstate: {tmp_path / 'state'}\n")
    done = CliRunner().invoke(app, ["tune", str(file)])
    assert done.exit_code == 0 and "less than a day of recorded load; the default stays" in done.output
    assert not (tmp_path / "state" / TUNED).exists()


def test_command_prints_the_table_and_writes_the_choice(tmp_path: Path) -> None:
    fleet(tmp_path / "state", steady(DAY))
    file = tmp_path / "fleet.yaml"
    file.write_text(
        f"policy: {{capacity: 2, interval_s: 60, cold_start_s: 120}}\nstate: {tmp_path / 'state'}\n"
    )
    advised = CliRunner().invoke(app, ["tune", str(file), "--advise"])
    assert advised.exit_code == 0 and not (tmp_path / "state" / TUNED).exists()
    done = CliRunner().invoke(app, ["tune", str(file)])
    assert done.exit_code == 0 and done.output == advised.output
    for shown in ("replica-hours", "in time", "rehearsed rules", "highest load of 5 min at 65%", "chosen"):
        assert shown in done.output
    assert json.loads((tmp_path / "state" / TUNED).read_text())


def snapshot(at: float, load: float) -> Snapshot:
    return Snapshot(time=at, current=5, ready=5, request_rate=load, backlog=0.0)


def test_running_controller_reads_the_choice_and_ignores_a_bad_file(tmp_path: Path) -> None:
    config = fleet(tmp_path, steady(DAY))
    estimates = make_estimates(config)

    def plan(at: float) -> str:
        estimates.observe(at, snapshot(at, 10.0))
        estimates.maintain(at)
        estimates.observe(at, snapshot(at, 10.0))
        found = estimates.plan(at)
        assert found is not None
        return f"{found.need:g} {found.rule}"

    start = 60.0 * DAY
    assert "tuned" not in plan(start)
    row = Row(Pinned(utilization=0.5), 0.0, 1.0)
    found = tune(config)
    assert found is not None
    write(config, replace(found, chosen=row))
    assert plan(start + 60) == "10 tuned: highest load of 5 min at 50%"
    (tmp_path / TUNED).write_text('{"utilization": 7}')
    assert plan(start + 120) == "10 tuned: highest load of 5 min at 50%"
    (tmp_path / TUNED).write_text('{"replicas": 12}')
    assert plan(start + 180) == "12 tuned: static fleet of 12"
    (tmp_path / TUNED).unlink()
    assert "tuned" not in plan(start + 240)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0.01, 1))
def test_pinned_rule_covers_the_load_at_its_utilization(loads: list[float], utilization: float) -> None:
    rule = PinnedRule(Settings(60.0, 120.0), Pinned(utilization=utilization))
    for load in loads:
        plan = rule.observe(load)
        assert plan.need * utilization == pytest.approx(plan.load) and plan.load >= plan.now
        assert plan.margin > 0


def test_default_stays_if_no_candidate_is_cheaper() -> None:
    rows = [Row(Pinned(), 10.0, 0.999), Row(Pinned(utilization=0.5), 10.0, 1.0)]
    assert best(rows, 0.995) is rows[0]
    assert best([*rows, Row(Pinned(replicas=1), 1.0, 0.9)], 0.995) is rows[0]
