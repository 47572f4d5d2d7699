"""Numbers of threads that `bench/scaling.py` measures."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.bench.test_page import BENCH


@pytest.mark.parametrize(
    ("cores", "beyond", "expected"),
    [(1, 0, [1]), (2, 64, [1, 2, 64]), (6, 0, [1, 2, 4, 6]), (8, 4, [1, 2, 4, 8])],
)
def test_powers_of_two_all_cores_and_more(
    monkeypatch: pytest.MonkeyPatch, cores: int, beyond: int, expected: list[int]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    assert import_module("scaling").counts(cores, beyond) == expected
