"""Which cases of the tests are fast, and how many."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import pytest

from tests.pairs import cover

CASES = 10_650  # fast ones: a case costs a millisecond in every process that collects it, before it runs
CASES_OF_A_FILE = 600


def test_every_pair_of_values_is_covered_by_few_cases() -> None:
    names = {"a": range(5), "b": range(4), "c": range(3), "d": range(2)}
    cases = [dict(zip(names, values, strict=True)) for values in product(*names.values())]
    few = [cases[i] for i in cover(cases)]
    for first, second in combinations(names, 2):
        held = {(case[first], case[second]) for case in few}
        assert held == set(product(names[first], names[second]))
    assert len(few) < len(cases) / 4


def test_one_parameter_keeps_its_cases_and_what_no_case_has_is_not_asked_for() -> None:
    assert cover([{"a": 1}, {"a": 2}]) == {0, 1}
    assert cover([{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 2, "b": 2}]) == {0, 1}


def test_fast_cases_are_few(request: pytest.FixtureRequest) -> None:
    """Of the files that this run collected: a product of parameters is marked `pairs`."""
    items = [i for i in request.session.items if not any(map(i.get_closest_marker, ("slow", "gpu")))]
    count, (file, most) = len(items), Counter(i.path.name for i in items).most_common(1)[0]
    assert count <= CASES and most <= CASES_OF_A_FILE, f"{count} cases, {most} of {file}"
