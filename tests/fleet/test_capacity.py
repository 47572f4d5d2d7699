"""Capacity, learned from the load of replicas."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.capacity import OnlineCapacity, Targets
from farthing_fleet.types import Snapshot


def carried(rate: float, queue: float, backlog: float = 0.0, ready: int = 2, current: int = 2) -> Snapshot:
    return Snapshot(0.0, current, ready, rate, rate, backlog=backlog, queue_time_s=queue)


def test_capacity_rises_with_load_within_the_targets() -> None:
    learner = OnlineCapacity(guess=1.0)
    for _ in range(300):
        learner.observe(carried(6.0, 0.01))
    assert learner.estimate == pytest.approx(3.0, rel=0.01)
    learner.observe(carried(1.0, 0.01))  # low load changes nothing
    assert learner.estimate == pytest.approx(3.0, rel=0.01)


def queued(learner: OnlineCapacity, arriving: float, throughput: float, current: int = 2) -> None:
    """300 snapshots of two replicas whose queue grows by what they do not process."""
    for second in range(300):
        backlog = 50 + (arriving - throughput) * second
        seen = Snapshot(second, current, 2, arriving, throughput, backlog=backlog, queue_time_s=5.0)
        learner.observe(seen)


@pytest.mark.parametrize("current", [2, 3])
def test_capacity_falls_to_the_throughput_of_a_saturated_fleet(current: int) -> None:
    """Also while replicas start: a fleet that is too small usually has some."""
    learner = OnlineCapacity(guess=4.0)
    queued(learner, 9.0, 4.0, current)
    assert learner.estimate == pytest.approx(2.0, rel=0.01)


def test_capacity_rises_to_the_throughput_of_a_saturated_fleet() -> None:
    learner = OnlineCapacity(guess=1.0)
    queued(learner, 9.0, 6.0)
    assert learner.estimate == pytest.approx(3.0, rel=0.01)


def test_a_queue_counts_what_was_processed_not_what_arrived() -> None:
    """Two replicas that get 9 requests/s and process 4: their prompts are those of 4."""
    learner = OnlineCapacity(guess=4.0)
    for second in range(300):
        seen = tokens(4.0, 1000, 100, backlog=50 + 5.0 * second)
        learner.observe(replace(seen, request_rate=9.0, time=float(second)))
    assert learner.costs is not None
    assert learner.costs[0] * 2000 + learner.costs[1] * 200 == pytest.approx(1.0, rel=0.01)


def test_one_waiting_request_is_no_saturation() -> None:
    learner = OnlineCapacity(guess=4.0)
    for _ in range(100):
        learner.observe(carried(1.0, 0.01, backlog=1))
    assert learner.estimate == 4.0


def test_snapshots_across_a_start_and_stale_ones_are_ignored() -> None:
    learner = OnlineCapacity(guess=1.0)
    learner.observe(carried(1.0, 0.01, ready=1, current=2))
    learner.observe(carried(6.0, 0.01, ready=2, current=2))
    learner.observe(Snapshot(0.0, 2, 2, 6.0, 6.0, backlog=0.0, queue_time_s=0.0, stale=True))
    assert learner.estimate == 1.0


@pytest.mark.parametrize("guess", [3.0, 12.0])
def test_the_time_per_token_tells_the_capacity_at_a_light_load(guess: float) -> None:
    """5 ms / (1 - rho), of at most 50 ms; 1,000 tokens/s are a tenth of rho, so at most 9,000 are good."""
    learner = OnlineCapacity(guess, targets=Targets(tpot_s=0.05))
    for step in range(600):
        rate = (0.5, 4.0)[step % 2]  # requests/s of 1,000 tokens on two replicas
        learner.observe(tokens(rate, 1, 1000, tpot=0.005 / (1 - rate / 2 / 10)))
    assert learner.estimate == pytest.approx(9.0, rel=0.25)


def test_capacity_is_bounded_around_the_guess() -> None:
    learner = OnlineCapacity(guess=1.0)
    for _ in range(500):
        learner.observe(carried(1000.0, 0.0))
    assert learner.estimate == 4.0


def test_capacity_falls_to_the_load_at_which_the_targets_are_missed() -> None:
    """Two replicas that carry three requests per second too slowly, without a queue, serve 1.5 each."""
    plain = OnlineCapacity(guess=4.0, targets=Targets(ttft_s=1.0))
    costs = OnlineCapacity(guess=4.0, targets=Targets(tpot_s=0.05))
    for _ in range(300):
        plain.observe(Snapshot(0.0, 2, 2, 3.0, 3.0, backlog=0.0, queue_time_s=0.0, ttft_s=3.0))
        costs.observe(tokens(3.0, 1000, 100, tpot=0.2))
    assert plain.costs is None and costs.costs is not None
    assert plain.estimate == pytest.approx(1.5, rel=0.01)
    assert costs.estimate == pytest.approx(1.5, rel=0.01)
    plain.observe(Snapshot(0.0, 2, 2, 7.0, 7.0, backlog=0.0, queue_time_s=0.0, ttft_s=3.0))
    costs.observe(tokens(7.0, 1000, 100, tpot=0.2))  # a breach is no evidence of a larger capacity
    assert (plain.estimate, costs.estimate) == pytest.approx((1.5, 1.5), rel=0.01)


@pytest.mark.parametrize(("rate", "backlog", "bound"), [(0.02, 50.0, 0.25), (1000.0, 0.0, 4.0)])
@pytest.mark.parametrize("guess", [1.0, 8.0])
def test_learned_costs_are_bounded_around_the_guess(
    guess: float, rate: float, backlog: float, bound: float
) -> None:
    """They stop within one step (5 %) of a quarter, and of four times, the guess."""
    learner = OnlineCapacity(guess=guess)
    for _ in range(500):
        learner.observe(tokens(rate, 1000, 100, backlog=backlog))
        assert guess / 4 <= learner.estimate * (1 + 1e-9) and learner.estimate <= guess * 4 * (1 + 1e-9)
    assert learner.estimate == pytest.approx(bound * guess, rel=0.06)


def test_capacity_without_lengths_does_not_fall_below_a_quarter_of_the_guess() -> None:
    learner = OnlineCapacity(guess=4.0)
    queued(learner, 9.0, 0.1)
    assert learner.estimate == pytest.approx(1.0, rel=0.25)


PREFILL, DECODE = 1 / 8000, 1 / 400  # true costs of the replica: busy seconds per token


def tokens(
    rate: float, prompt: float, output: float, *, backlog: float = 0.0, tpot: float = 0.02
) -> Snapshot:
    """Two replicas that receive `rate` requests per second of these lengths."""
    return Snapshot(
        0.0,
        2,
        2,
        rate,
        rate,
        rate * prompt,
        rate * output,
        backlog=backlog,
        queue_time_s=1.0 if backlog else 0.01,
        tpot_s=tpot,
    )


def truth(prompt: float, output: float) -> float:
    return 1 / (PREFILL * prompt + DECODE * output)


@given(
    st.lists(
        st.tuples(
            st.just(0.0) | st.floats(1e-3, 1e4),
            st.sampled_from([0.0, 0.02, 0.0449, 0.045, 0.05, 0.0500001, 1.0, 1e3]) | st.floats(0, 10),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_no_time_per_token_breaks_the_estimate(seen: list[tuple[float, float]]) -> None:
    """Not even that of an idle replica whose every token is late, with a target of 50 ms."""
    learner = OnlineCapacity(guess=4.0, targets=Targets(tpot_s=0.05))
    for rate, tpot in seen:
        assert 1.0 <= learner.observe(tokens(rate, 1000, 100, tpot=tpot)) <= 16.0


def test_the_guess_holds_for_the_mean_request_though_the_first_ones_still_run() -> None:
    """At the start, requests have arrived that will answer for longer than a snapshot."""
    learner = OnlineCapacity(guess=4.0)
    for answered in (60, 200, 400):
        assert learner.observe(tokens(1.0, 200, answered)) == pytest.approx(4.0, rel=0.5)
    for _ in range(20):
        learner.observe(tokens(1.0, 200, 600))
    assert learner.estimate == pytest.approx(4.0, rel=0.1)
    for _ in range(40):  # from then on, longer answers are more work
        learner.observe(tokens(1.0, 200, 1200))
    assert learner.estimate == pytest.approx(2.0, rel=0.1)


def test_both_costs_are_learned_from_saturated_replicas() -> None:
    source, learner = random.Random(0), OnlineCapacity(guess=1.5)
    for _ in range(4000):
        prompt, output = source.uniform(200, 8000), source.uniform(20, 600)
        learner.observe(tokens(2 * truth(prompt, output), prompt, output, backlog=10))
    assert learner.costs == pytest.approx((PREFILL, DECODE), rel=0.1)
    for prompt, output in ((500, 500), (6000, 50)):
        for _ in range(1000):  # lengths fade with the requests that are served
            learner.observe(tokens(0.1, prompt, output))
        assert learner.estimate == pytest.approx(truth(prompt, output), rel=0.15)


def test_longer_answers_lower_the_capacity_before_a_queue_grows() -> None:
    learner = OnlineCapacity(guess=2.0)
    for _ in range(50):
        learner.observe(tokens(3.0, 1000, 100))
    before = learner.estimate
    for _ in range(20):
        learner.observe(tokens(1.5, 1000, 400))
    assert learner.estimate < 0.5 * before


def test_capacity_does_not_rise_while_tpot_is_above_its_target() -> None:
    """Replicas that batch ever more requests have no queue; only their time per token shows saturation."""
    watched = OnlineCapacity(guess=2.0, targets=Targets(tpot_s=0.05))
    blind = OnlineCapacity(guess=2.0)
    for learner in (watched, blind):
        learner.observe(tokens(2.0, 1000, 100))
        for _ in range(400):
            learner.observe(tokens(11.6, 1000, 100, tpot=0.2))
    assert blind.estimate > 5
    assert watched.estimate <= 2.0
    plain = OnlineCapacity(guess=2.0, targets=Targets(ttft_s=1.0))
    for _ in range(400):
        plain.observe(Snapshot(0.0, 2, 2, 11.6, 11.6, backlog=0.0, queue_time_s=0.0, ttft_s=3.0))
    assert plain.estimate <= 2.0


def test_cached_prompts_cost_nothing() -> None:
    learner = OnlineCapacity(guess=2.0)
    for share, lengths in ((0.0, (4000, 100)), (0.9, (4000, 100))):
        for _ in range(60):
            seen = tokens(1.0, *lengths)
            learner.observe(replace(seen, cached_share=share))
        if share == 0:
            cold = learner.estimate
    assert learner.estimate > 2 * cold


def test_learning_does_not_count_cached_prompts() -> None:
    """Saturated replicas that compute a tenth of their prompts are as busy as with prompts of a tenth."""
    cached, short = OnlineCapacity(guess=2.0), OnlineCapacity(guess=2.0)
    for _ in range(100):
        seen = tokens(6.0, 4000, 100, backlog=10)
        cached.observe(replace(seen, cached_share=0.9))
        short.observe(tokens(6.0, 400, 100, backlog=10))
    assert cached.costs == pytest.approx(short.costs)


def test_capacity_in_tokens_depends_on_the_mix() -> None:
    learner = OnlineCapacity(guess=2000.0, unit="tokens")
    for _ in range(60):
        learner.observe(tokens(1.0, 1000, 100))
    assert learner.estimate == pytest.approx(2000.0, rel=0.02)
    for _ in range(60):
        learner.observe(tokens(1.0, 100, 1000))
    assert learner.estimate < 1000
