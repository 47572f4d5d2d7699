"""The instruction sets that tests of kernels and backends compute with."""

import os

from farthing import _native

ALL = tuple(_native.instruction_sets().split())
# Every set shares the driving code of the others, so a push proves the best one, which this machine serves
# with, that of most people's machines, and the portable one. `make test-isa` and `make test-slow` prove all
# of them, once a week.
ISAS = tuple(
    name
    for name in ALL
    if name in (ALL[0], "avx2", "portable") or os.environ.get("FARTHING_TEST_ISAS") == "all"
)


def threads_of(isa: str) -> int:
    """Two with the best kernels. `test_cpu_threads` compares thread counts with all of them."""
    return 2 if isa == ALL[0] else 1
