"""The tiny model on a real socket, shared by the tests that only send requests; and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.server.browser import chromium
from tests.server.harness import Running, running, tiny_engine


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    """A server of the tiny model with high limits."""
    with running(tiny_engine()) as server:
        yield server


@pytest.fixture
def client(tiny: Running) -> OpenAI:
    """The OpenAI client of that server."""
    return tiny.client()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with chromium() as driver:
        yield driver
