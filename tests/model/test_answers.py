"""What is said of every model stays as it is when the way it is described changes."""

from __future__ import annotations

import pytest

from tests.model.answers import configurations, digests, expected

CONFIGURATIONS = configurations()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_answers_are_as_before(name: str) -> None:
    """`python -m tests.model.answers NAME` prints what differs, before and after a change."""
    assert digests(CONFIGURATIONS[name]) == expected()[name]


def test_every_configuration_has_answers() -> None:
    assert CONFIGURATIONS.keys() == expected().keys()
