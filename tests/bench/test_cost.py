"""`farthing bench cost`: rows, claims and prices by hand, and two real rows of a tiny checkpoint."""

import json
import sys
from pathlib import Path

import pytest
import torch

from farthing.bench import cost
from farthing.bench import cost as cost_probe
from farthing.bench.cost import (
    Lever,
    Probe,
    Quality,
    Row,
    Texts,
    Workload,
    bf16_checkpoint,
    claims,
    compare,
    levers,
    ours,
    prompts_for,
    qualities,
    tiny_checkpoint,
)
from farthing.checkpoint.floats import quantize_blocks
from farthing.checkpoint.writer import CheckpointWriter
from farthing.cost.prices import Hardware, Machine

MACHINE = Machine(Hardware(name="box", kind="cpu", usd_per_hour=3.6, watts=10, idle_watts=4), 2)


def test_claims_are_shares_saved_and_report_unmet_ones() -> None:
    found = claims(Row("a", 100, 1000, 2.0, "rapl", 5.0), Row("b", 30, 700, 0.84, "rapl", 1.0))
    assert found["latency"] == {"published": 0.62, "measured": pytest.approx(0.7), "met": True}
    assert found["memory"]["measured"] == pytest.approx(0.3) and not found["memory"]["met"]
    assert found["power"]["measured"] == pytest.approx(0.58)
    assert "quality" not in found


def test_quality_is_met_when_its_whole_interval_is_within_the_budget() -> None:
    first = Row("a", 100, 1000, 2.0, "rapl", 5.0)
    for change, high, met in ((0.004, 0.009, True), (0.004, 0.011, False)):
        last = Row("b", 30, 700, 0.84, "rapl", 1.0, Quality(change, 0.0, high, 1000))
        found = claims(first, last, budget=0.01)["quality"]
        assert found == {"budget": 0.01, "measured": change, "interval": [0.0, high], "met": met}


def test_latency_is_the_time_between_tokens_of_a_request_after_its_first() -> None:
    times = [at for token in range(5) for at in (2.0 + 0.5 * token, 2.0 + 0.5 * token)]  # of two requests
    assert cost_probe._latency(times, 2) == pytest.approx(0.5)


def test_cpu_time_is_finer_than_a_hundredth_of_a_second() -> None:
    assert len({cost_probe._cpu() for _ in range(1000)}) > 100  # a row of 64 tokens takes 20 ms


def test_rows_are_medians_priced_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def probe(lever: Lever, workload: Workload, machine: Machine, threads: int) -> Probe:
        if threads > 1:
            return Probe(1e9, 1e9, 1e9, 1e9, "estimated", 0, 4)  # slower, so it is ignored
        order.append(lever.name)
        seconds = {"a": [8.0, 100.0, 6.0], "b": [1.0, 1.0, 1.0]}[lever.name][order.count(lever.name) - 1]
        return Probe(seconds * 10, seconds, seconds, seconds * 20, "estimated", 500, 4)

    monkeypatch.setattr(cost, "_probe", probe)
    rows = [Lever("a"), Lever("b", {})]
    found = compare(Workload(model="m", prompts=((1,),)), rows, MACHINE, rounds=3)
    assert order == ["a", "b"] * 3, "interleaved"
    first = found.rows[0]
    assert first.latency_ms_per_token == 80 and first.joules_per_token == 40
    assert first.usd_per_million_tokens == pytest.approx(8 * 0.002 / 4 * 1e6)
    document = json.loads(json.dumps(found.to_json()))
    assert set(document["rows"][0]) == {
        "name",
        "latency_ms_per_token",
        "memory_bytes",
        "joules_per_token",
        "joules_source",
        "usd_per_million_tokens",
        "quality",
    }
    assert set(document["claims"]) == {"latency", "memory", "power"}


def test_interrupted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def probe(lever: Lever, workload: Workload, machine: Machine, threads: int) -> Probe:
        if len(calls) == 3 * len({1, MACHINE.count}):
            raise RuntimeError("cut off")
        calls.append(lever.name)
        return Probe(10.0, 1.0, 1.0, len(calls), "estimated", 500, 4)

    monkeypatch.setattr(cost, "_probe", probe)
    rows, record = [Lever("a"), Lever("b", {})], tmp_path / "record.json"
    workload = Workload(model="m", prompts=((1,),))
    with pytest.raises(RuntimeError, match="cut off"):
        compare(workload, rows, MACHINE, 2, record=record)
    kept = len(calls)
    calls.clear()
    found = compare(workload, rows, MACHINE, 2, record=record)
    assert len(calls) == kept // 3, "only what was missing"
    assert [row.name for row in found.rows] == ["a", "b"]
    with pytest.raises(ValueError, match="from other rows or another workload"):
        compare(workload, rows[:1], MACHINE, 2, record=record)


def test_prompts_are_deterministic_and_bad_workloads_are_rejected(tmp_path: Path) -> None:
    first = prompts_for(tmp_path, 100, 3, 5)
    assert first == prompts_for(tmp_path, 100, 3, 5) and [len(p) for p in first] == [5, 5, 5]
    with pytest.raises(ValueError, match="prompts"):
        Workload(model="m", prompts=())
    with pytest.raises(ValueError, match="output_tokens: got 1"):
        Workload(model="m", prompts=((1,),), output_tokens=1)


def test_quantized_checkpoint_is_written_as_dense(tmp_path: Path) -> None:
    weight = torch.randn(130, 140)
    data, scale = quantize_blocks(weight)
    writer = CheckpointWriter(tmp_path)
    writer.add("a.weight", data)
    writer.add("a.weight_scale_inv", scale)
    writer.add("norm.weight", torch.ones(3))
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    writer.close({"model_type": "deepseek_v3", "quantization_config": fp8})
    from safetensors.torch import load_file

    with bf16_checkpoint(tmp_path) as dense:
        found = load_file(dense / "model.safetensors")
        assert set(found) == {"a.weight", "norm.weight"}
        assert found["a.weight"].dtype == torch.bfloat16
        assert torch.allclose(found["a.weight"].float(), weight, atol=0.3)
        assert "quantization_config" not in json.loads((dense / "config.json").read_text())
        with bf16_checkpoint(dense) as same:
            assert same == dense, "a dense checkpoint is used as it is"
    assert not dense.exists()


def test_failing_row_is_named(tmp_path: Path) -> None:
    workload = Workload(model=str(tmp_path / "none"), prompts=((1, 2),), output_tokens=2)
    with pytest.raises(RuntimeError, match="a lever: exit status 1"):
        compare(workload, [Lever("a lever", {"backend": "reference"})], MACHINE, rounds=1)


def test_every_token_of_the_engine_has_a_time() -> None:
    request = {
        "model": "mite",
        "prompts": [[5, 6], [7, 8, 9]],
        "output_tokens": 3,
        "threads": 1,
        "options": {},
    }
    with ours(request | {"options": {}}) as generate:
        assert len(generate()) == 2 * 3


def test_model_without_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json; expected one"):
        Texts.of(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_rows_of_the_embedded_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from farthing.hub import resolve_model

    path = resolve_model("mite")
    with bf16_checkpoint(path) as dense:
        tiny = str(tiny_checkpoint(tmp_path / "tiny"))
        prompts = prompts_for(path, 8192, 1, 16)
        workload = Workload(model=str(dense), prompts=prompts, output_tokens=4, tiny=tiny)
        rows = [Lever("original"), Lever("ours", {"backend": "auto"})]
        found = compare(workload, rows, MACHINE, rounds=1)
    assert all(row.latency_ms_per_token > 0 and row.joules_per_token > 0 for row in found.rows)
    assert all(row.memory_bytes > 1 << 20 for row in found.rows)


@pytest.mark.slow
def test_levers_are_calibrated_within_the_budget(tmp_path: Path) -> None:
    from farthing.hub import resolve_model

    path = resolve_model("mite")
    with bf16_checkpoint(path) as dense:
        texts = Texts.of(path, max_tokens=4096)
        rows = levers(dense, tmp_path, 0.02, texts)
        found = dict(qualities(dense, rows, texts.judged))
    assert [row.options is None for row in rows] == [True] + [False] * (len(rows) - 1)
    assert (
        rows[-1].options == {"quantization": "int8", "speculate": "mtp+ngram"}
        and rows[-1].model == rows[-2].model
    )
    kernels, last = found[rows[1].name], found[rows[-1].name]
    assert found[rows[0].name] is None and kernels is not None and last is not None
    assert abs(kernels.change) < 0.002, "our bfloat16 kernels compute the same model"
    assert -0.01 < last.change < 0.05
