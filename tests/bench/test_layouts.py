"""bench/layouts.py: layouts as `farthing serve` options."""

from __future__ import annotations

from importlib import import_module

import pytest

pytest.importorskip("farthing._native")

from farthing.parallel.plan import Layout
from tests.bench.test_page import BENCH


def test_layouts_parse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    layouts = import_module("layouts")
    assert [layouts.Way.of(text).layout.world for text in layouts.WAYS] == [1, 2, 2, 2, 2, 1, 1]
    way = layouts.Way.of("--tp 2 --ep 4 --dp-attention")
    assert way == layouts.Way(Layout(2, 1, 4, True), None, 0)
    assert layouts.Way.of("--experts-on cpu --hot-experts 3") == layouts.Way(Layout(), "cpu", 3)
    with pytest.raises(SystemExit):
        layouts.Way.of("--quantization int4")
    assert "unrecognized arguments: --quantization int4" in capsys.readouterr().err
