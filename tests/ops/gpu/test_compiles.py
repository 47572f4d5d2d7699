"""Every kernel compiles for an H100 to machine code that holds its tiles in registers. Nothing is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MOST_STACK = 64  # bytes a thread: addresses, not tiles
TILED = {"gemm", "gate_up", "down", "decode", "prefill", "two_of_four", "blocks"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler comes with its Linux wheel")
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_hopper.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} >= TILED | {"route", "sort", "draw", "softmax", "norm_quantize"}
    for k in kernels:
        assert k["stack"] <= MOST_STACK, k
        assert k["shared"] <= 227 << 10, k
        if k["kernel"] in TILED:
            assert {"wgmma.mma_async", "mma.sync"} & set(k["instructions"]), k  # tensor cores
    large = [k for k in kernels if k["kernel"] in ("gemm", "prefill") and k["warps"] == 8]
    assert large and all("wgmma.mma_async" in k["instructions"] for k in large)
