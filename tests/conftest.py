"""Settings that apply before any test is imported.

Triton's kernels are interpreted on the CPU, except in `make test-gpu`. Torch computes on one thread, because
`make test` runs one worker per core. Hypothesis does not judge how fast examples run, because machines are
shared.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of async tests; the product runs only on asyncio."""
    return "asyncio"
