"""Every kernel compiles for every GPU generation, fits it, and keeps its tiles in registers. Nothing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MOST_STACK = 80  # bytes per thread: addresses, not tiles
PRODUCTS = {"wgmma.mma_async", "mma.sync", "tcgen05.mma"}
TILED = {"gemm", "gate_up", "down", "decode", "prefill", "two_of_four", "blocks", "index_scores"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler comes with its Linux wheel")
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_every_kernel_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(script), "--capability", str(capability), "--all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {k["kernel"] for k in kernels}
    assert names >= TILED | {"route", "sort", "sample_tokens", "softmax"}
    assert ("norm_quantize" in names) == (capability >= 89)  # kernels that quantize to FP8
    for k in kernels:
        assert k["stack"] <= MOST_STACK, k
        assert k["shared"] <= k["limit"], k
    tensor_cores = {k["kernel"] for k in kernels if set(k["instructions"]) & PRODUCTS}
    assert tensor_cores == TILED
    large = [k for k in kernels if k["kernel"] in ("gemm", "prefill") and set(k["instructions"]) & PRODUCTS]
    large = [k for k in large if k["warps"] == 8]
    assert large
    if capability == 90:
        assert all("wgmma.mma_async" in k["instructions"] for k in large)
