"""Planner Gym's workloads and its KEDA defaults."""

from __future__ import annotations

import numpy as np
import pytest

from farthing_lab.replay.requests import Fleet, simulate
from farthing_lab.replay.servers import ReplayedRequest
from tests.lab.replay.gym import CHUNK, COLD_START_S, MOST, SPAN_S, TIMES, WORKLOADS, Keda, score


def test_workloads_are_repeatable_and_shaped_as_they_say() -> None:
    made = {name: workload.requests(0) for name, workload in WORKLOADS.items()}
    for name, jobs in made.items():
        assert 500 < len(jobs) < 1600, name
        assert all(0 <= job.arrival < SPAN_S and job.prompt > 0 and job.output > 0 for job in jobs)
        assert [job.prompt for job in jobs] == [job.prompt for job in WORKLOADS[name].requests(0)]
    spike = [job for job in made["flash crowd"] if 80 <= job.arrival < 95]
    assert len(spike) / 15 > 3 * (len(made["flash crowd"]) - len(spike)) / (SPAN_S - 15)
    assert np.median([job.output for job in made["decode heavy"]]) > 500
    assert all(job.blocks[0] == 0 for job in made["shared prefix"])
    first = [job.blocks for job in made["flat"]]
    assert len({block for blocks in first for block in blocks}) == sum(map(len, first))


def test_keda_orders_a_replica_for_five_waiting_requests_and_keeps_it_for_five_minutes() -> None:
    fleet, keda = Fleet(TIMES, COLD_START_S, CHUNK), Keda()
    fleet.start(2)
    assert keda.target(0.0, fleet) == 1  # as an HPA that saw nothing else
    fleet.unrouted.extend(ReplayedRequest(0.0, 10, 10) for _ in range(28))
    assert keda.target(15.0, fleet) == 6
    fleet.unrouted.extend(ReplayedRequest(0.0, 10, 10) for _ in range(40))
    assert keda.target(30.0, fleet) == 6  # at most four more
    fleet.start(6)
    fleet.unrouted.clear()
    assert keda.target(45.0, fleet) == 6
    for tick in range(19):
        lowest = keda.target(60.0 + 15 * tick, fleet)
    assert lowest == 1 <= MOST


def test_every_request_of_a_run_ends() -> None:
    jobs = WORKLOADS["decode heavy"].requests(0)[:60]
    fleet = Fleet(TIMES, COLD_START_S, CHUNK)
    fleet.start(1)
    billed = simulate(jobs, Keda(), fleet, 60.0)
    assert len(fleet.done) == len(jobs) and billed >= 60.0


@pytest.mark.parametrize(("name", "seed"), [("shared prefix", 7), ("decode heavy", 11)])
def test_one_replica_is_kept_where_it_suffices(name: str, seed: int) -> None:
    """Its time per token, far below the target, tells the capacity that no queue has shown.

    The first requests of decode heavy still run when they are counted: their answers look short.
    """
    kept = score(WORKLOADS[name], "farthing", seed=seed)
    assert kept.good > 0.99 and kept.replicas < 1.1


def test_a_staircase_buys_more_good_requests_than_keda() -> None:
    ours, keda = (score(WORKLOADS["staircase"], name, seed=7) for name in ("farthing", "keda"))
    assert ours.good > 0.7 and ours.per_replica_second > 1.1 * keda.per_replica_second
