"""Prompt chunks adapt to the measured speed: a simulated machine meets the step limit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.config import EngineConfig
from farthing.engine.pace import SCORING, SMALLEST_CHUNK, SMALLEST_SCORED, Pace
from farthing.options import check


@pytest.mark.parametrize("limit", [math.inf, 1e308, math.nan, -1.0])
def test_limit_is_finite(limit: float) -> None:
    with pytest.raises(ValueError, match=r"max_step_ms: got .*; expected a number >= 0 and <= "):
        check(EngineConfig(max_step_ms=limit))


def test_no_bound_without_a_limit_or_without_decoding() -> None:
    assert Pace(0).prompt_tokens(8) is None
    assert Pace(0.15).prompt_tokens(0) is None


@given(
    limit=st.floats(0.05, 1.0),
    decode=st.floats(1e-4, 0.04),
    cost=st.floats(1e-6, 2e-3),
    drift=st.floats(1.0, 1.02),
    decodes=st.integers(1, 64),
    decode_measured=st.booleans(),
)
def test_mixed_steps_converge_to_the_limit(
    limit: float, decode: float, cost: float, drift: float, decodes: int, decode_measured: bool
) -> None:
    """decode: seconds of a decode step; cost: seconds per prompt token, growing by `drift` per step.

    Without a measured decode step (cold), the first chunk sizes are found by trial: six steps suffice.
    """
    pace = Pace(limit)
    if decode_measured:
        pace.observe(0, 512, 512 * cost * 0.7)  # a large prompt step is cheaper per token
        for _ in range(5):
            pace.observe(decodes, 0, decode)
    durations = []
    for _ in range(60):
        chunk = pace.prompt_tokens(decodes)
        assert chunk is not None and chunk >= SMALLEST_CHUNK
        tokens = min(chunk, 8192)
        seconds = decode + cost * tokens
        cost *= drift
        pace.observe(decodes, tokens, seconds)
        durations.append((seconds, tokens))
    floor = decode + cost * SMALLEST_CHUNK  # the smallest chunk may exceed the limit
    assert all(seconds <= max(1.3 * limit, floor) for seconds, _ in durations[6:])
    seconds, tokens = durations[-1]
    assert tokens in (SMALLEST_CHUNK, 8192) or seconds >= 0.6 * limit  # and the step is well used


def test_single_slow_step_does_not_starve_prompts() -> None:
    pace = Pace(0.15)
    for _ in range(20):
        pace.observe(4, pace.prompt_tokens(4) or 0, 0.02 + 1e-3 * (pace.prompt_tokens(4) or 0))
    before = pace.prompt_tokens(4)
    pace.observe(4, before or 0, 10.0)
    after = pace.prompt_tokens(4)
    assert before is not None and after is not None and after > before / 2


@given(cost=st.floats(1e-7, 1e-1))
def test_scored_prompt_tokens_take_their_share_of_a_step(cost: float) -> None:
    pace = Pace(0)
    for _ in range(6):
        tokens = pace.scored_tokens()
        pace.observe_scores(tokens, tokens * cost)
    assert pace.scored_tokens() * cost <= max(1.01 * SCORING, SMALLEST_SCORED * cost)
    assert pace.scored_tokens() >= min(SCORING / cost - 1, SMALLEST_SCORED)
    assert pace.scored_tokens(shared=True) == max(SMALLEST_SCORED, int(SCORING * 0.5 / pace._score))
