"""Before any test imports Triton: kernels are interpreted on the CPU, unless `make test-gpu` says no."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of async tests: the product runs on asyncio only."""
    return "asyncio"
