"""Capacity: read, and learnt from what replicas carry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from farthing.fleet.capacity import Capacity, OnlineCapacity
from farthing.fleet.decisions import Snapshot


def carried(rate: float, queue: float, backlog: float = 0.0, ready: int = 2, current: int = 2) -> Snapshot:
    return Snapshot(0.0, current, ready, rate, backlog=backlog, queue_time_s=queue)


def test_read_and_refuse(tmp_path: Path) -> None:
    path = tmp_path / "capacity.json"
    path.write_text(json.dumps({"capacity": 3.5, "unit": "tokens"}))
    assert Capacity.read(path).per_replica == 3.5
    path.write_text("{}")
    with pytest.raises(ValueError, match="bench capacity"):
        Capacity.read(path)
    with pytest.raises(ValueError, match="per_replica"):
        Capacity(-1)


def test_rises_with_what_is_carried_in_time() -> None:
    learner = OnlineCapacity(guess=1.0)
    for _ in range(300):
        learner.observe(carried(6.0, 0.01))
    assert learner.estimate == pytest.approx(3.0, rel=0.01)
    learner.observe(carried(1.0, 0.01))  # a quiet hour teaches nothing
    assert learner.estimate == pytest.approx(3.0, rel=0.01)


def test_falls_to_what_a_saturated_fleet_completes() -> None:
    learner = OnlineCapacity(guess=4.0)
    for _ in range(300):
        learner.observe(carried(9.0, 5.0, backlog=50), completed=4.0)
    assert learner.estimate == pytest.approx(2.0, rel=0.01)


def test_starting_replicas_and_stale_signals_teach_nothing() -> None:
    learner = OnlineCapacity(guess=1.0)
    learner.observe(carried(6.0, 0.01, ready=1, current=2))
    learner.observe(Snapshot(0.0, 2, 2, 6.0, backlog=0.0, queue_time_s=0.0, stale=True))
    assert learner.estimate == 1.0


def test_bounded_around_the_guess() -> None:
    learner = OnlineCapacity(guess=1.0)
    for _ in range(500):
        learner.observe(carried(1000.0, 0.0))
    assert learner.estimate == 4.0
