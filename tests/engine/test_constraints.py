"""Reasoning budgets and forbidden words: masks match what may be consumed, with and without drafts."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.engine.constraints import All, Constraint, ReasoningBudget, Vocabulary
from farthing.engine.request import ReasoningParams

VOCAB = 8
OPEN, CLOSE, SLASH, EOS = 1, 2, 3, 0


def walk(constraint: Constraint, rng: random.Random, length: int) -> list[int]:
    """Generate random text that the constraint allows."""
    text = []
    for _ in range(length):
        (allowed,) = constraint.masks([], VOCAB)
        token = rng.choice(np.flatnonzero(allowed).tolist())
        constraint.consume(token)
        text.append(token)
    return text


@pytest.mark.parametrize("end", [(CLOSE,), (SLASH, CLOSE), (SLASH, SLASH, CLOSE)])
@given(seed=st.integers(0, 2**32), budget=st.integers(0, 6))
def test_reasoning_ends_within_its_budget(end: tuple[int, ...], seed: int, budget: int) -> None:
    constraint = ReasoningBudget(ReasoningParams(end=end, open=True, budget=budget))
    text = walk(constraint, random.Random(seed), 24)
    size = len(end)
    ends = [i for i in range(len(text)) if tuple(text[i : i + size]) == end]
    assert ends and ends[0] <= budget


def test_the_budget_is_exact() -> None:
    constraint = ReasoningBudget(ReasoningParams(end=(CLOSE,), budget=3))
    for _ in range(3):
        (allowed,) = constraint.masks([], VOCAB)
        assert allowed.all()
        constraint.consume(5)
    (allowed,) = constraint.masks([], VOCAB)
    assert np.flatnonzero(allowed).tolist() == [CLOSE]
    with pytest.raises(ValueError, match="budget of 3"):
        constraint.consume(5)
    constraint.consume(CLOSE)
    assert constraint.masks([], VOCAB).all()


def test_reasoning_opened_by_the_model_has_the_same_budget() -> None:
    params = ReasoningParams(end=(CLOSE,), start=OPEN, open=False, budget=1)
    constraint = ReasoningBudget(params)
    for token in (OPEN, 5):
        assert constraint.masks([], VOCAB).all()
        constraint.consume(token)
    assert np.flatnonzero(constraint.masks([], VOCAB)[0]).tolist() == [CLOSE]
    answers = ReasoningBudget(params)
    for token in (5, 5, 5, 5):  # no reasoning at all
        answers.consume(token)
    assert answers.masks([], VOCAB).all()


@pytest.mark.parametrize("opened", [False, True])
@given(seed=st.integers(0, 2**32), budget=st.integers(0, 6))
def test_reasoning_begun_late_or_again_shares_the_budget(opened: bool, seed: int, budget: int) -> None:
    params = ReasoningParams(end=(CLOSE,), start=OPEN, open=opened, budget=budget)
    used, inside = 0, opened
    for token in walk(ReasoningBudget(params), random.Random(seed), 60):
        if inside:
            inside = token != CLOSE
            used += inside
        else:
            inside = token == OPEN
    assert used <= budget


def test_a_line_break_before_the_reasoning_does_not_lift_its_budget() -> None:
    constraint = ReasoningBudget(ReasoningParams(end=(CLOSE,), start=OPEN, open=False, budget=2))
    for token in (7, OPEN, 5, 5):  # as GLM-4.5 begins
        constraint.consume(token)
    assert np.flatnonzero(constraint.masks([], VOCAB)[0]).tolist() == [CLOSE]


def test_constraint_applies_only_after_reasoning() -> None:
    constraint = ReasoningBudget(ReasoningParams(end=(CLOSE,)), Vocabulary([6], ()), ends=(EOS,))
    assert np.flatnonzero(~constraint.masks([], VOCAB)[0]).tolist() == [EOS]
    constraint.consume(5)
    constraint.consume(CLOSE)
    assert np.flatnonzero(constraint.masks([], VOCAB)[0]).tolist() == [6]


def test_forbidden_sequences() -> None:
    constraint = Vocabulary(None, [(4,), (5, 6), (5, 5, 7)])
    assert np.flatnonzero(~constraint.masks([], VOCAB)[0]).tolist() == [4]
    constraint.consume(5)
    assert np.flatnonzero(~constraint.masks([], VOCAB)[0]).tolist() == [4, 6]
    constraint.consume(5)
    assert np.flatnonzero(~constraint.masks([], VOCAB)[0]).tolist() == [4, 6, 7]


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=8)
CONSTRAINTS = st.one_of(
    st.builds(
        lambda end, budget, opened: ReasoningBudget(
            ReasoningParams(end=tuple(end), start=OPEN, open=opened, budget=budget),
            Vocabulary(None, [(6,)]),
            (EOS,),
        ),
        st.sampled_from([(CLOSE,), (SLASH, CLOSE)]),
        st.none() | st.integers(0, 4),
        st.booleans(),
    ),
    st.builds(
        lambda forbidden: Vocabulary([0, 1, 2, 3, 5, 6, 7], forbidden),
        st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple), max_size=3),
    ),
    st.builds(
        lambda budget: All(
            [ReasoningBudget(ReasoningParams(end=(CLOSE,), budget=budget)), Vocabulary(None, [(5, 6), (7,)])]
        ),
        st.integers(0, 4),
    ),
)


@given(CONSTRAINTS, TOKENS, TOKENS)
def test_masks_of_drafts_are_those_of_the_tokens(
    constraint: Constraint, before: list[int], drafts: list[int]
) -> None:
    for token in before:
        (allowed,) = constraint.masks([], VOCAB)
        if allowed[token]:
            constraint.consume(token)
    here = constraint.copy()
    masks = here.masks(drafts, VOCAB)
    assert masks.shape == (1 + len(drafts), VOCAB)
    valid = here.valid_prefix(drafts)
    for position in range(valid + 1):
        assert (masks[position] == here.masks([], VOCAB)[0]).all()
        if position < len(drafts):
            assert masks[position, drafts[position]] == (position < valid)
        if position < valid:
            here.consume(drafts[position])
    fresh = constraint.masks([], VOCAB)
    assert (fresh[0] == masks[0]).all()  # the copy did not advance the original


def test_masks_share_one_array_of_allowed_tokens() -> None:
    vocabulary = Vocabulary([3, 5, 9], [(4, 5)])
    twin = vocabulary.copy()
    twin.consume(4)
    assert np.flatnonzero(twin.masks([], 8)).tolist() == [3]
    first, second = vocabulary.masks([4], 8)
    assert np.flatnonzero(first).tolist() == [3, 5] and np.flatnonzero(second).tolist() == [3]
    assert np.flatnonzero(vocabulary.masks([], 12)).tolist() == [3, 5, 9]  # the cached array is unchanged
    assert vocabulary._rules is twin._rules
