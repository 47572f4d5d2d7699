"""Instruction sets selected by a backend's name and by --deterministic."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from farthing.ops.cpu import CpuOps
from farthing.ops.select import select
from tests.isas import ALL


@pytest.mark.parametrize("isa", ALL)
def test_backend_with_an_instruction_set(isa: str) -> None:
    assert select(f"cpu/{isa}", threads=1).name == f"cpu/{isa}, 1 thread"


@pytest.mark.parametrize("backend", ["cpu/avx9", "reference/avx2", "none"])
def test_unknown_backends_are_rejected(backend: str) -> None:
    got = "instruction set 'avx9' is unknown" if "/avx9" in backend else f"backend: got '{backend}'; expected"
    with pytest.raises(ValueError, match=f"^{got}"):
        select(backend, threads=1)


@pytest.mark.parametrize("isa", ["auto", *ALL])
def test_deterministic_sums_with_every_instruction_set(isa: str) -> None:
    ops = select("cpu" if isa == "auto" else f"cpu/{isa}", threads=1, parts=2)
    assert isinstance(ops, CpuOps)
    assert ops.name == f"cpu/{ALL[0] if isa == 'auto' else isa}, 1 thread"


def test_deterministic_sums_need_the_cpu_backend() -> None:
    with pytest.raises(ValueError, match="deterministic: got True with backend 'reference'"):
        select("reference", parts=2)


def run(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from farthing import _native as n; print(n.instruction_sets(), n.Backend(1).isa)"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FARTHING_ISA": isa}, capture_output=True, text=True
    )


def test_environment_leaves_one_instruction_set() -> None:
    """As `make test-isa` does."""
    assert run(ALL[-1]).stdout.split() == [ALL[-1]] * 2
    error = run("avx9").stderr
    assert "ValueError: FARTHING_ISA: got 'avx9'; expected an instruction set of this processor" in error


def test_errors_name_field_and_value() -> None:
    with pytest.raises(ValueError, match=r"^threads: got 0; expected at least 1$"):
        select("cpu", threads=0)
    with pytest.raises(
        ValueError, match=r"^dtype: got torch\.float16 with backend 'cpu'; expected float32 or"
    ):
        select("cpu", torch.float16)
