"""Set before any test imports Triton: interpret kernels on the CPU, except in `make test-gpu`."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of async tests; the product runs only on asyncio."""
    return "asyncio"
