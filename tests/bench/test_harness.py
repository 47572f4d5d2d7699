"""The benchmarks' harness: turns, repeated calls, percentiles, and processes that do not start."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from types import ModuleType

import pytest

from tests.bench.test_page import BENCH


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module("harness")


def test_programs_take_turns_and_every_second_round_is_reversed(harness: ModuleType) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    found = harness.in_turns(runs, rounds=2, warm=1)
    assert "".join(order) == "abbaab"
    assert found == {"a": [4, 5], "b": [3, 6]}  # the first round does not count
    assert harness.medians(found) == {"a": 4.5, "b": 4.5}


def test_calls_are_repeated_until_they_take_long_enough(harness: ModuleType) -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 0.25

    assert harness.timed([call, call], lambda: now[0], at_least=2.0) == 0.25
    assert now == [2.0]


def test_percentiles(harness: ModuleType) -> None:
    values = list(range(1, 101))
    assert [harness.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert math.isnan(harness.percentile([], 0.5))


def test_process_that_ends_before_it_is_up_is_named(harness: ModuleType) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    up = harness.accepts(harness.free_port())
    with (
        pytest.raises(SystemExit, match=r"SystemExit\(3\) did not start; status 3"),
        harness.running(command, up),
    ):
        raise AssertionError("unreachable")
