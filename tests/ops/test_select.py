"""Instruction sets selected by a backend's name and by --deterministic."""

from __future__ import annotations

import pytest
import torch

from farthing import _native
from farthing.ops import select
from farthing.ops.cpu import CpuOps

ISAS = _native.instruction_sets().split()


@pytest.mark.parametrize("isa", ISAS)
def test_backend_with_an_instruction_set(isa: str) -> None:
    assert select(f"cpu/{isa}", threads=1).name == f"cpu/{isa}, 1 thread"


@pytest.mark.parametrize("backend", ["cpu/avx9", "reference/avx2", "none"])
def test_unknown_backends_are_rejected(backend: str) -> None:
    got = "instruction set 'avx9' is unknown" if "/avx9" in backend else f"backend: got '{backend}'; expected"
    with pytest.raises(ValueError, match=f"^{got}"):
        select(backend, threads=1)


def test_deterministic_sums_do_not_use_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with AMX, the best of the other instruction sets is selected."""
    monkeypatch.setattr(_native, "instruction_sets", lambda: f"amx {' '.join(ISAS)}")
    ops = select("cpu", threads=1, parts=2)
    assert isinstance(ops, CpuOps)
    assert ops.name == f"cpu/{next(s for s in ISAS if s != 'amx')}, 1 thread"
    with pytest.raises(ValueError, match="deterministic: got True with backend 'cpu/amx'"):
        select("cpu/amx", threads=1, parts=1)
    with pytest.raises(ValueError, match="deterministic: got True with backend 'reference'"):
        select("reference", parts=2)


def test_errors_name_field_and_value() -> None:
    with pytest.raises(ValueError, match=r"^threads: got 0; expected at least 1$"):
        select("cpu", threads=0)
    with pytest.raises(
        ValueError, match=r"^dtype: got torch\.float16 with backend 'cpu'; expected float32 or"
    ):
        select("cpu", torch.float16)
