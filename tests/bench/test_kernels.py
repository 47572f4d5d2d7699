"""bench/kernels.py measures every kernel of every format."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module

import pytest

pytest.importorskip("farthing._native")

from tests.bench.test_large_models import TINY
from tests.bench.test_page import BENCH


@pytest.mark.parametrize("only", ["linear", "moe", "mla", "head"])
def test_every_kernel_of_every_format(monkeypatch: pytest.MonkeyPatch, only: str) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    kernels = import_module("kernels")
    monkeypatch.setattr(kernels, "config", lambda size: TINY | {"q_lora_rank": 64, "v_head_dim": 32})
    monkeypatch.setattr(kernels, "UNCACHED", 1)
    monkeypatch.setattr(kernels, "CONTEXTS", (128,))
    bench = kernels.Bench(1, "auto", 1, [1, 3])
    formats = ["int4", "int8", "bf16", *([] if only == "mla" else ["fp8", "nl4"])]
    kernels.run(bench, Namespace(only=only, formats=formats, model="tiny"))
    measured = {row.kernel.replace(",", "").split()[1] for row in bench.rows}
    assert measured == set(formats)
    assert all(row.microseconds > 0 for row in bench.rows)


def test_weights_take_the_bytes_of_their_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    kernels = import_module("kernels")
    bench = kernels.Bench(1, "auto", 1, [1])
    for name, bits in {"nl4": 4.25, "int4": 4.25, "int8": 8, "fp8": 8, "bf16": 16}.items():
        packed = bench.packed(name, [kernels.weight(name, 512, 2048)])
        assert bits <= packed.nbytes * 8 / (512 * 2048) <= bits * 1.04, name
