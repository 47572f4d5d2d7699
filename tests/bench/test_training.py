"""bench/training.py counts the bytes that are served."""

from __future__ import annotations

from importlib import import_module

import pytest

pytest.importorskip("farthing._native")

from farthing.hub import resolve_model
from farthing.model.load import load
from farthing.ops.select import select
from tests.bench.test_page import BENCH


def test_served_bytes_are_those_of_the_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    training = import_module("training")
    kinds = (None, "int8", "int4")
    fp8, int8, int4 = (
        training.served_bytes(load(resolve_model("mite"), select("cpu", threads=1, quantization=k)))
        for k in kinds
    )
    assert int4 < int8 < fp8 * 1.1
