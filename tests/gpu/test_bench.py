"""Without a GPU the benchmark reports so for every row and claims nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")

from farthing_gpu.bench import __main__ as bench
from farthing_gpu.bench import attention, products, tune
from farthing_gpu.launch import FOLDER, INTERPRETED, Config, read_configs
from tests.tiny import tiny

SMALL = {
    "mla_decode": [(2, 64, 2, "bfloat16"), (1, 128, 3, "fp8")],
    "mla_prefill": [(2, 20, 2)],
    "dense_fp8": [(5, 128, 256)],
    "experts": [
        ("fp8", 3, 4, 2, 128, 128),
        ("int8", 3, 4, 2, 128, 64),
        ("int4", 3, 4, 2, 128, 128),
        ("dense", 3, 4, 2, 64, 32),
    ],
    "linear": [("int4", 1, 64, 128), ("dense", 2, 64, 128)],
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
    monkeypatch.setattr(products, "CUDA", torch.device("cpu"))
    module = attention if hasattr(attention, make) else products
    for arguments in SMALL[make]:
        row = getattr(module, make)(*arguments)
        out = row.run()
        assert not isinstance(out, torch.Tensor) or not out.isnan().any()
        assert row.bytes > 0 or row.flops > 0
        if make != "dense_fp8":  # torch has that product only on a GPU
            row.peer()


@pytest.mark.skipif(not INTERPRETED, reason="the bench itself is what runs on a GPU")
def test_the_decode_step_runs_at_a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CUDA", torch.device("cpu"))
    small = tiny(model_type="deepseek_v2", q_lora_rank=None, vocab_size=64)
    monkeypatch.setattr(attention, "V2_LITE", attention.V2_LITE | small)
    row = attention.decode_step(2, 64)
    (_, ids, _), (_, plain, _) = row.run(), row.peer()
    assert torch.equal(ids, plain)


def test_every_row_of_the_table_is_known() -> None:
    assert {row.make.__name__ for row in bench.ROWS} == {*SMALL, "decode_step"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: rows would be measured")
def test_without_a_gpu_only_the_reason_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into, page = tmp_path / "gpu.json", tmp_path / "page.md"
    page.write_text("# A page\n\n<!-- measured: gpu -->\nold\n<!-- end -->\n\nrest\n")
    assert bench.main(["--page", str(page), "--into", str(into)]) == 0
    assert "Nothing was measured: no CUDA device" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("# A page\n") and text.endswith("<!-- end -->\n\nrest\n") and "old" not in text
    assert "Nothing was measured: no CUDA device" in text
    assert "| " not in text
    document = json.loads(into.read_text())
    assert document["rows"] == [] and "CUDA" in document["reason"]


def test_targets_are_in_the_table() -> None:
    targets = {r.kernel: bench.wanted(r) for r in bench.ROWS if bench.wanted(r) != "–"}
    assert targets == {
        "MLA decode, bf16 cache": "80% of the ceiling",
        "FP8 GEMM": "55% of the ceiling, 1x torch",
        "grouped FP8": "70% of the dense one",
        "softmax": "3.75x torch",
        "decode step, V2-Lite shape": "60% of the ceiling",
    }


def test_measured_row_is_compared_with_its_target() -> None:
    row = bench.ROWS[0]
    result = bench.Result(row.kernel, row.size, 50.0, "2,700 GB/s", 0.79, "torch", 500.0, "", False)
    assert bench.cells(row, result)[-3:] == ["500 us (10.00x, torch)", "80% of the ceiling", "missed"]


def test_unknown_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "convolution"])
    assert "matches nothing" in capsys.readouterr().err


def test_unavailable_peer_only_omits_its_own_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA out of memory\nTried to allocate 40 GiB")

    def make() -> Any:
        return products.Work(lambda: None, "copy", 9e8, 0.0, fails, "torch")

    clock = SimpleNamespace(medians=lambda *runs: [1000.0] * len(runs))
    row = bench.Row("FP8 GEMM", "", make, (), share=0.55, times_peer=1.0)
    result = bench.measure(row, clock, {"copy": 1e12}, None)
    assert (result.share, result.met) == (0.9, None)  # undecided: the peer did not run
    assert bench.cells(row, result)[5:] == ["torch: CUDA out of memory", "55% of the ceiling, 1x torch", "–"]
    alone = bench.Row("FP8 GEMM", "", make, (), share=0.55)
    assert bench.measure(alone, clock, {"copy": 1e12}, None).met is True


@pytest.mark.skipif(not INTERPRETED, reason="the bench itself is what runs on a GPU")
def test_tuning_keeps_the_fastest_working_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real candidates, tiny workloads, and a clock that favors wide tiles of 4 warps."""
    monkeypatch.setattr(tune, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test 1")
    ran: list[Config] = []

    def run(choice: Config) -> None:
        ran.append(choice)
        if choice.bn == 128:
            raise RuntimeError("out of resource: shared memory")

    def medians(*runs: Any) -> list[float]:
        return [100.0 - r.args[0].bn + r.args[0].num_warps for r in runs]

    jobs = tune.jobs()
    assert set(jobs) <= set(read_configs(FOLDER / "default.json"))
    assert all(job.candidates == list(dict.fromkeys(job.candidates)) for js in jobs.values() for job in js)
    job = replace(jobs["gemm_fp8"][0], make=lambda: SimpleNamespace(run=run))
    never = replace(job, candidates=[Config(bn=128)])
    monkeypatch.setattr(tune, "jobs", lambda: {"gemm_fp8": [job], "decode": [job, never], "prefill": [job]})
    assert tune.tune(medians, Console(quiet=True), "e") == 0
    table = read_configs(tmp_path / "test-1.json")
    assert set(table) == {"gemm_fp8", "prefill"}  # no partial kernel
    [(rows, chosen)] = table["prefill"]
    assert (rows, chosen.bn, chosen.num_warps) == (16, 64, 4)
    assert set(ran) == {*job.candidates, *never.candidates}
    tune.tune(medians, Console(quiet=True), "prefill")
    assert set(read_configs(tmp_path / "test-1.json")) == {"gemm_fp8", "prefill"}  # existing entries are kept
