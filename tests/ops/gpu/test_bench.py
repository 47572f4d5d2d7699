"""Without a GPU the bench says so, row by row, and claims nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from farthing.ops.gpu.numeric import INTERPRETED

BENCH = Path(__file__).parents[3] / "bench"


def script(name: str) -> ModuleType:
    """A file of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench() -> ModuleType:
    return script("gpu")


SMALL = {
    "mla_decode": [(2, 64, 2, "bfloat16"), (1, 128, 3, "fp8")],
    "mla_prefill": [(2, 20, 2)],
    "dense_fp8": [(5, 128, 256)],
    "experts": [("fp8", 3, 4, 2, 128, 128), ("int8", 3, 4, 2, 128, 64), ("int4", 3, 4, 2, 128, 128)],
    "quantized_decode": [(1, 64, 128)],
    "softmax": [(3, 40)],
    "softmax_fused": [(2, 70)],
    "norm_quantize": [(3, 256)],
    "routing": [(2,)],
    "rotary": [(3, 2)],
    "sparse_product": [("2:4", 3, 64, 64), ("16x16", 3, 64, 320)],
    "sampling": [(2, 300)],
}


@pytest.mark.skipif(not INTERPRETED, reason="the bench itself is what runs on a GPU")
@pytest.mark.parametrize("make", list(SMALL))
def test_every_row_runs_at_a_small_size(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = script("gpu_work")
    monkeypatch.setattr(work, "CUDA", torch.device("cpu"))
    for arguments in SMALL[make]:
        row = getattr(work, make)(*arguments)
        out = row.run()
        assert not isinstance(out, torch.Tensor) or not out.isnan().any()
        assert row.bytes > 0 or row.flops > 0
        if make != "dense_fp8":  # torch has that product on a GPU only
            row.peer()


@pytest.mark.skipif(not INTERPRETED, reason="the bench itself is what runs on a GPU")
def test_the_decode_step_runs_at_a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    work = script("gpu_work")
    monkeypatch.setattr(work, "CUDA", torch.device("cpu"))
    small = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    monkeypatch.setattr(work, "V2_LITE", work.V2_LITE | small)
    row = work.decode_step(2, 64)
    (_, ids, _), (_, plain, _) = row.run(), row.peer()
    assert torch.equal(ids, plain)


def test_every_row_of_the_table_is_known(bench: ModuleType) -> None:
    assert {row.make for row in bench.ROWS} == {*SMALL, "decode_step"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: rows would be measured")
def test_every_row_is_not_measured(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    into = tmp_path / "gpu.json"
    assert bench.main(["--markdown", "--into", str(into)]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(bench.ROWS)
    assert all(line.count(bench.NOT_MEASURED) == 4 for line in lines)
    assert "Nothing was measured: no CUDA device" in out
    document = json.loads(into.read_text())
    assert document["rows"] == [] and "CUDA" in document["reason"]


def test_targets_of_the_issue_are_in_the_table(bench: ModuleType) -> None:
    targets = {r.kernel: bench.wanted(r) for r in bench.ROWS if bench.wanted(r) != "–"}
    assert targets == {
        "MLA decode, bf16 cache": "80% of the ceiling",
        "FP8 GEMM": "55% of the ceiling, 1x torch",
        "grouped FP8": "70% of the dense one",
        "softmax": "3.75x torch",
        "decode step, V2-Lite shape": "60% of the ceiling",
    }


def test_a_measured_row_is_judged(bench: ModuleType) -> None:
    row = bench.ROWS[0]
    result = bench.Result(row.kernel, row.size, 50.0, "2,700 GB/s", 0.79, "torch", 500.0, "", False)
    assert bench.cells(row, result)[-3:] == ["500 us (10.00x, torch)", "80% of the ceiling", "missed"]


def test_a_kernel_nobody_knows(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "convolution"])
    assert "names no kernel" in capsys.readouterr().err
