"""Settings that apply before any test is imported.

Triton's kernels are interpreted on the CPU, except in `make test-gpu`. Torch computes on one thread, because
`make test` runs one worker per core. Hypothesis does not judge how fast examples run, because machines are
shared. It tries fewer examples than usual and the same ones in every run, so that a commit passes or fails by
its own; `make test-all` (`--hypothesis-profile thorough`) looks for new ones.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.pairs import cover

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the user's cache holds, such as packed models, decides nothing.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="farthing-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# Bytecode is kept whatever the environment says: otherwise each of the hundreds of processes that
# tests start would compile all it imports.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
_SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", _SHARED)
settings.register_profile("quick", _SHARED, max_examples=40, derandomize=True)
settings.load_profile("quick")
gc.disable()  # until all tests are imported


@pytest.hookimpl(tryfirst=True)  # before cases are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `pairs`, the cases that hold every pair of its parameters' values stay fast."""
    tests: dict[Any, list[Any]] = {}
    for item in items:
        if hasattr(item, "callspec") and {m.name for m in item.iter_markers()} & {"pairs", "slow"} == {
            "pairs"
        }:
            tests.setdefault((item.parent, item.name.partition("[")[0]), []).append(item)
    for cases in tests.values():
        # A value of `parametrize` is one object in all cases that have it, and need not be hashable.
        fast = cover([{k: id(v) for k, v in case.callspec.params.items()} for case in cases])
        for i, case in enumerate(cases):
            if i not in fast:
                case.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """The libraries that tests import are permanent: later collections skip them."""
    gc.enable()
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # so that the interpreter can clear its modules


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of async tests; the product runs only on asyncio."""
    return "asyncio"


@pytest.fixture
def sparse_on_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero blocks are left out as with AVX-512: on AMX, never measured, and where AVX2 would gain nothing."""
    from farthing.ops import weights

    for isa in ("amx", "avx2"):
        monkeypatch.setitem(weights.COSTS, isa, weights.COSTS["avx512"])


@pytest.fixture(scope="module")
def exact_on_amx() -> Iterator[None]:
    """Steps of every size take the form of small ones on AMX, where only `--deterministic` promises the bits
    that the module's tests compare; other instruction sets have no other form."""
    if find_spec("farthing._native") is None:
        yield
        return
    from farthing.ops.cpu import CpuOps

    start = CpuOps.__init__

    def init(self: CpuOps, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        self._native.tile_tokens = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuOps, "__init__", init)
        yield
