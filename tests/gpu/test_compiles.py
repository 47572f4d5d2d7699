"""Every kernel compiles for every GPU generation, fits it, and keeps its tiles in registers. Nothing runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import farthing_gpu as gpu

MOST_STACK = 80  # bytes per thread: addresses, not tiles
PRODUCTS = {"wgmma.mma_async", "mma.sync", "tcgen05.mma"}
TILED = {"gemm", "gate_up", "down", "decode", "prefill", "two_of_four", "blocks", "index_scores"}


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheel is for Linux")


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_in_the_language(tmp_path: Path) -> None:
    """The interpreter accepts more, such as conditions on floats."""
    names = {k["kernel"] for k in compiled(tmp_path, "--parse")}
    defined = set()
    for path in Path(gpu.__file__).parent.glob("*.py"):
        for kernel in re.findall(r"@triton\.jit\ndef (\w+)\(", path.read_text(encoding="utf-8")):
            if re.search(rf"\b{kernel}\[", path.read_text(encoding="utf-8")):
                defined.add(kernel.removeprefix("_"))
    assert names >= defined


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_every_kernel_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    kernels = compiled(tmp_path, "--capability", str(capability), "--all")
    names = {k["kernel"] for k in kernels}
    assert names >= TILED | {"route", "sort", "sample_tokens", "softmax", "write_entries", "list_rows"}
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
