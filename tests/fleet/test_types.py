"""Decision lines, the log, and quantile forecasts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.config import PolicyConfig
from farthing_fleet.decision_log import DecisionLog, read_log
from farthing_fleet.policy import Policy
from farthing_fleet.rehearsal import Plan
from farthing_fleet.types import Decision, Levels, Snapshot


def decided(now: float = 0.0) -> Decision:
    snapshot = Snapshot(time=now, current=2, ready=2, request_rate=3.0, backlog=0.0, queue_time_s=0.0)
    return Policy(PolicyConfig(capacity=1.0)).decide(
        now, snapshot, Plan(5.7, 4.0, 3.0, 1.43, "highest of 15 min")
    )


def test_decision_round_trips_through_a_json_line() -> None:
    line = decided().to_json()
    assert "\n" not in line
    assert set(json.loads(line)) >= {"time", "inputs", "levels", "decided_by", "reason", "target"}
    assert Decision.from_json(line) == decided()


@given(st.integers(0, 10**6), st.one_of(st.none(), st.integers(0, 10**6)), st.text(max_size=40))
def test_any_decision_round_trips(target: int, level: int | None, reason: str) -> None:
    made = Decision(
        1.5, 3, target, "hold", "short", Levels(short=level), reason, None, ("a", reason), {"x": [1, None]}
    )
    assert Decision.from_json(made.to_json()) == made


def test_error_quotes_an_invalid_line() -> None:
    with pytest.raises(ValueError, match="not a decision line"):
        Decision.from_json('{"time": 1}')


def test_samples_omit_levels_without_an_estimate() -> None:
    samples = decided().samples()
    assert samples["farthing:fleet_desired_replicas"] == 6
    assert samples["farthing:fleet_short_replicas"] == 6
    assert "farthing:fleet_realtime_replicas" not in samples


def test_log_returns_the_last_decisions_and_skips_a_partial_line(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "sub" / "decisions.jsonl")
    for now in range(5):
        log.append(decided(float(now)))
    with log.path.open("a") as file:
        file.write('{"time": 9, "curr')
    assert [d.time for d in read_log(log.path, 3)] == [2.0, 3.0, 4.0]
    with pytest.raises(FileNotFoundError, match="controller"):
        read_log(tmp_path / "none.jsonl")


def test_log_rotates(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "d.jsonl", max_bytes=2000)
    for now in range(20):
        log.append(decided(float(now)))
    assert log.path.stat().st_size <= 2000
    assert (tmp_path / "d.jsonl.1").exists()
    assert read_log(log.path, 1)[0].time == 19.0
