"""When 'auto' selects the GPU."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

import farthing_gpu as gpu
from farthing.ops.select import resolve
from farthing.ops.select import select as selection
from farthing_gpu import launch


def test_auto_selects_the_gpu_only_for_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(import_module("farthing.ops.select"), "_device", lambda: True)
    assert resolve("auto") == "gpu"
    capability = (7, 5)
    assert resolve("auto") != "gpu"
    capability = (9, 0)
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    assert resolve("auto") != "gpu"
    assert resolve("gpu") == "gpu"


def test_explicit_backend_runs_interpreted_on_request() -> None:
    if launch.INTERPRETED:
        ops = selection("gpu", torch.float32)
        assert ops.name == "gpu/triton float32, interpreted on the CPU"
        assert ops.cache_dtype == "float32"


def test_too_old_device_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7\.5; .* needs 8\.0"):
        gpu.create(None, None, None, None)


def test_device_without_fp8_has_no_fp8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = selection("gpu")
    monkeypatch.setattr(ops, "_fp8", False)
    with pytest.raises(ValueError, match=r"the cache's dtype is 'fp8', .*expected 'bfloat16' or 'int8'"):
        ops.new_cache(1, 4, 16, 576, "fp8")
    assert ops.new_cache(1, 4, 16, 576, "int8").scale is not None
