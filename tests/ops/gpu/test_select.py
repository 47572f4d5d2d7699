"""When 'auto' means the GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from farthing.ops import select as selection
from farthing.ops.gpu import numeric
from farthing.ops.select import resolve


def test_auto_is_the_gpu_only_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(numeric, "INTERPRETED", False)
    assert resolve("auto") == "gpu"
    monkeypatch.setattr(numeric, "INTERPRETED", True)
    assert resolve("auto") != "gpu"
    assert resolve("gpu") == "gpu"


def test_by_name_it_is_interpreted_where_asked() -> None:
    if numeric.INTERPRETED:
        ops = selection("gpu", torch.float32)
        assert ops.name == "gpu/triton float32, interpreted on the CPU"
        assert ops.cache_dtype == "float32"
