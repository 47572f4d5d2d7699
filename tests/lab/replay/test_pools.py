"""One pool against prefill and decode pools: exact times of the simulated replicas, and a comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from farthing_lab.cli.replay import app
from farthing_lab.replay.pools import LAYOUTS, PoolsConfig, advised, expected_hours
from farthing_lab.replay.servers import Decode, Prefill, ReplayedRequest, Server, Times, Whole

TIMES = Times(prefill_s=0.001, base_s=0.01, share_s=0.002, max_batch=2, cache_blocks=8, transfer_s=0.0)


def run(server: Server, *jobs: ReplayedRequest, step: float = 1000.0) -> list[ReplayedRequest]:
    """Route the jobs at their arrivals, advancing at least every `step` seconds; returns them as finished."""
    done: list[ReplayedRequest] = []
    now = 0.0
    for job in jobs:
        while now < job.arrival:
            now = min(now + step, job.arrival)
            server.advance(now, done)
        server.add(job)
    while server.requests:
        now += step
        server.advance(now, done)
    return done


def test_chunks_delay_running_requests_by_their_time_only() -> None:
    first, second = ReplayedRequest(0.0, 100, 101), ReplayedRequest(0.2, 90, 2)
    run(Whole(TIMES, 0.0, 0.0, chunk=30), first, second, step=0.05)
    assert first.first == pytest.approx(0.11)  # alone: the whole prompt at once
    # three iterations of 12 ms + 30 ms with a chunk, begun at the end of an iteration of 12 ms
    assert 0.2 < second.first - 3 * 0.042 <= 0.2 + 0.012 + 1e-9
    assert second.tpot_s == pytest.approx(0.01 + 2 * 0.002)
    assert first.end - first.first == pytest.approx(100 * 0.012 + 3 * 0.03 + 0.002)


def test_cached_blocks_are_not_computed_again() -> None:
    times = Times(prefill_s=0.001, base_s=0.0, cache_blocks=8)
    jobs = [ReplayedRequest(10.0 * i, 1100, 1, blocks=(1, 2) if i != 1 else (1, 3)) for i in range(3)]
    run(Prefill(times, 0.0, 0.0), *jobs)
    assert [job.uncached for job in jobs] == [1100, 1100 - 512, 1100 - 1024]
    assert jobs[2].ttft_s == pytest.approx(0.076)


def test_prefill_replica_reports_a_request_when_its_prompt_is_computed() -> None:
    server, done = Prefill(TIMES, 0.0, 0.0), []  # type: ignore[var-annotated]
    server.add(ReplayedRequest(0.0, 1000, 5))
    server.advance(0.5, done)
    assert not done and server.requests == 1
    server.advance(2.0, done)
    assert [job.first for job in done] == [pytest.approx(1.01)]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200), st.integers(1, 30)), min_size=1, max_size=20),
    st.sampled_from([Whole, Prefill]),
    st.floats(0.01, 3),
)
def test_every_request_is_served_whole(
    requests: list[tuple[float, int, int]], kind: type[Server], step: float
) -> None:
    at, jobs = 0.0, []
    for gap, prompt, output in requests:
        at += gap
        jobs.append(ReplayedRequest(at, prompt, output, uncached=prompt))
    done = run(kind(TIMES, 0.0, 0.0), *jobs, step=step)
    if kind is Prefill:
        assert all(job.first == job.end for job in done)
        done = run(Decode(TIMES, 0.0, 0.0), *[job for job in done if job.output > 1], step=step)
    for job in jobs:
        assert job.arrival < job.first <= job.end < float("inf")
        assert job.tpot_s >= 0.012 - 1e-9 or job.output == 1
    assert len(set(map(id, done))) == len(done)


def test_two_pools_are_compared_with_one(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 200 * i, "input_length": 6000, "output_length": 100, "hash_ids": [i // 3, -i - 1]}
        for i in range(600)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--pools", "--load-time", "20", "--tpot", "0.06", "--no-plan", "--model", "last-value"]
    result = CliRunner().invoke(app, [str(path), *options, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    layouts = document["layouts"]
    assert document["advised"] == "two pools"
    kinds = ("", ", tuned", ", oracle")
    assert list(layouts) == [layout + kind for layout in ("one pool", "two pools") for kind in kinds]
    one, two = layouts["one pool, tuned"], layouts["two pools, tuned"]
    assert one["slo"] >= 0.99 and two["slo"] >= 0.99
    assert two["instance_hours"] == pytest.approx(two["prefill"] + two["decode"])
    assert two["instance_hours"] < one["instance_hours"]
    for layout, tuned in (("one pool", one), ("two pools", two)):
        oracle = layouts[f"{layout}, oracle"]
        assert oracle["slo"] >= 0.99
        assert oracle["instance_hours"] <= tuned["instance_hours"]


@pytest.mark.parametrize(
    ("per_second", "layout"), [(0.1, "one pool"), (0.3, "one pool"), (20.0, "two pools")]
)
def test_two_pools_are_advised_only_for_enough_load(per_second: float, layout: str) -> None:
    """Each pool needs a replica of its own."""
    jobs = [ReplayedRequest(i / per_second, 6000, 100, uncached=6000) for i in range(round(600 * per_second))]
    config = PoolsConfig(tpot_s=0.06)
    assert advised(jobs, config, 0.7) == layout
    for kinds in LAYOUTS.values():
        assert expected_hours(jobs, kinds, config, 0.7) >= len(kinds) * 600 / 3600


def test_targets_below_an_iteration_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tpot: got 0\.03; expected more than 0\.036"):
        PoolsConfig(tpot_s=0.03)
