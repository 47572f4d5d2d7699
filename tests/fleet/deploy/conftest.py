from __future__ import annotations

import pytest

from tests.fleet.deploy.rendering import SETS, VALUES, Object, rendered


@pytest.fixture(scope="module", params=[*SETS, *(f"helm:{name}" for name in VALUES)])
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """Every object of one rendering."""
    return rendered(request.param)
