"""The simulated replica: exact times of chunked prompts, the prefix cache, and that nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing_lab.replay.servers import ReplayedRequest, Replica, Times

TIMES = Times(prefill_s=0.001, base_s=0.01, share_s=0.002, max_batch=2, cache_blocks=8)


def run(server: Replica, *jobs: ReplayedRequest, step: float = 1000.0) -> list[ReplayedRequest]:
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
    run(Replica(TIMES, 0.0, 0.0, chunk=30), first, second, step=0.05)
    assert first.first == pytest.approx(0.11)  # alone: the whole prompt at once
    # three iterations of 12 ms + 30 ms with a chunk, begun at the end of an iteration of 12 ms
    assert 0.2 < second.first - 3 * 0.042 <= 0.2 + 0.012 + 1e-9
    assert second.tpot_s == pytest.approx(0.01 + 2 * 0.002)
    assert first.end - first.first == pytest.approx(100 * 0.012 + 3 * 0.03 + 0.002)


def test_running_requests_do_not_stand_still_until_the_next_one_arrives() -> None:
    """Requests are routed at the start of the second in which they arrive."""
    first, second = ReplayedRequest(0.0, 100, 101), ReplayedRequest(0.9, 90, 2)
    replica, done = Replica(TIMES, 0.0, 0.0, chunk=30), []
    replica.add(first)
    replica.add(second)
    replica.advance(100.0, done)
    assert first.end - first.first == pytest.approx(100 * 0.012 + 3 * 0.03 + 0.002)
    assert second.first == pytest.approx(0.9 + 3 * 0.042, abs=0.012)


def test_cached_blocks_are_not_computed_again() -> None:
    times = Times(prefill_s=0.001, base_s=0.0, cache_blocks=8)
    jobs = [ReplayedRequest(10.0 * i, 1100, 1, blocks=(1, 2) if i != 1 else (1, 3)) for i in range(3)]
    run(Replica(times, 0.0, 0.0), *jobs)
    assert [job.uncached for job in jobs] == [1100, 1100 - 512, 1100 - 1024]
    assert jobs[2].ttft_s == pytest.approx(0.076)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200), st.integers(1, 30)), min_size=1, max_size=20),
    st.floats(0.01, 3),
)
def test_every_request_is_served_whole(requests: list[tuple[float, int, int]], step: float) -> None:
    at, jobs = 0.0, []
    for gap, prompt, output in requests:
        at += gap
        jobs.append(ReplayedRequest(at, prompt, output, uncached=prompt))
    done = run(Replica(TIMES, 0.0, 0.0), *jobs, step=step)
    for job in jobs:
        assert job.arrival < job.first <= job.end < float("inf")
        assert job.tpot_s >= 0.012 - 1e-9 or job.output == 1
    assert len(set(map(id, done))) == len(done) == len(jobs)
