"""bench/kernels.py measures every kernel of every format."""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib import import_module
from types import ModuleType

import pytest

pytest.importorskip("farthing._native")

from tests.bench.test_page import BENCH

TINY = {
    "hidden_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 32, "num_attention_heads": 2,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 32, "vocab_size": 512,
}  # fmt: skip


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bench's module, whether or not transformers has imported the package of the same name."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))  # put back when the test ends
    del sys.modules["kernels"]
    return import_module("kernels")


@pytest.mark.parametrize("only", ["linear", "moe", "mla", "head"])
def test_every_kernel_of_every_format(
    monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, only: str
) -> None:
    monkeypatch.setattr(kernels, "config", lambda size: TINY)
    monkeypatch.setattr(kernels, "UNCACHED", 1)
    monkeypatch.setattr(kernels, "CONTEXTS", (128,))
    bench = kernels.Bench(1, "auto", 1, [1, 3])
    formats = ["int4", "int8", "bf16", *([] if only == "mla" else ["fp8", "nl4"])]
    kernels.run(bench, Namespace(only=only, formats=formats, model="tiny"))
    measured = {row.kernel.replace(",", "").split()[1] for row in bench.rows}
    assert measured == set(formats)
    assert all(row.microseconds > 0 for row in bench.rows)


def test_weights_take_the_bytes_of_their_format(kernels: ModuleType) -> None:
    bench = kernels.Bench(1, "auto", 1, [1])
    for name, bits in {"nl4": 4.25, "int4": 4.25, "int8": 8, "fp8": 8, "bf16": 16}.items():
        packed = bench.packed(name, [kernels.weight(name, 512, 2048)])
        assert bits <= packed.nbytes * 8 / (512 * 2048) <= bits * 1.04, name


@pytest.mark.parametrize("only", ["sparse", "cells"])
def test_forms_of_a_product_take_turns(
    monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, only: str
) -> None:
    forms = import_module("kernels_forms")
    monkeypatch.setattr(kernels, "UNCACHED", 1)
    monkeypatch.setattr(forms, "SHAPES", ((64, 128),))
    monkeypatch.setattr(forms, "WIDTH", 128)
    bench = kernels.Bench(1, "auto", 1, [1, 3])
    headings, rows = forms.measure(bench, Namespace(only=only, formats=["int8", "bf16"], zeros=0.5))
    assert len(rows) == (6 if only == "sparse" else 2)
    assert all(len(row) == len(headings) and min(row[2:]) > 0 for row in rows)
