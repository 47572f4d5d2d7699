"""The estimate: manual calculation, comparison with published deployments, direction of change, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from farthing.cli.errors import Exit
from farthing.cli.plan import app
from farthing.model.config import ModelConfig
from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.buffers import Serving
from farthing.planner.estimate import (
    Estimate,
    Target,
    _Group,
    _Replica,
    groups,
    published_config,
    serving,
    smallest,
)
from farthing.planner.footprint import Holder, stored_by_config
from farthing.planner.memory import PlannedModel
from farthing.planner.roofline import Workload, load_devices

DEVICES, SHARES = load_devices()
PUBLISHED = Workload(4383, 1210, 0.563, 1 / 21)


@cache
def planned(name: str) -> PlannedModel:
    raw = published_config(name)
    assert raw is not None
    return PlannedModel.of(ShardPlan.build(ModelConfig.from_json(raw), Layout()), stored_by_config(raw))


def target(
    name: str = "deepseek-v3",
    gpu: str = "h100",
    cache: str = "bfloat16",
    redundant: int = 0,
    quantization: str | None = None,
    memory: float | None = None,
    **fields: Any,
) -> Target:
    model, device = planned(name), DEVICES[gpu]
    config = model.config
    load = Serving(0, config.max_position_embeddings, 1, 8192, cache_dtype=cache, redundant_experts=redundant)
    limit = int((memory or device.memory) * 1e9 * 0.9)
    return Target(model, Holder("gpu", 2, quantization), load, limit, device, SHARES, **fields)


def test_parts_match_manual_calculation() -> None:
    v3 = target(gpu="h800", redundant=32)
    rank = _Group(v3, ShardPlan.spread(v3.config, 144)).stages[0]
    assert rank.experts == 2
    parts = rank.parts[3]
    expert = 3 * 7168 * 2048
    assert [(p.weights, p.fp8) for p in parts["expert"]] == [(expert, True)]
    fp8, bf16 = parts["attention"]  # kv_b is multiplied per head, in bf16
    assert fp8.weights == 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 128 * 128 * 7168
    assert bf16.weights == 512 * 128 * 256 and bf16.nbytes == 2 * bf16.weights
    assert fp8.nbytes == pytest.approx(fp8.weights, rel=3e-4)  # and a float32 scale per block of 128 x 128
    # One token of each of 144 GPUs: two experts and the shared one are read; arithmetic is negligible.
    read = 2 * (1 - (1 - 8 / 288) ** 144)
    gate = 4 * 256 * 7168
    assert rank.feed_forward(3, 1, 144) == pytest.approx(
        ((1 + read) * expert + gate) / (3350e9 * 0.9), rel=1e-3
    )
    # With 128 heads, attention over the latent cache is barely compute-bound.
    attention = rank.decode_attention(3, 1, 5000)
    assert attention == pytest.approx(2 * 5000 * 128 * (512 + 576) / (989e12 * 0.67))
    assert attention == pytest.approx(5000 * 576 * 2 / (3350e9 * 0.9), rel=0.15)


def test_deployment_matches_manual_calculation() -> None:
    """V3 in FP8 on 16 H100, --tp 8 --ep 16: memory, and one decode step of 64 sequences."""
    e = serving(target(sequences=64), Layout(8, 1, 16), PUBLISHED, 2.0)
    assert e.decode.tokens_per_step == 64 and e.prefill.gpus == e.decode.gpus == 16
    expert = 3 * 7168 * 2048
    routed = 59 * 16 * expert  # 58 layers and the MTP layer, 256 / 16 experts
    cut = (1536 * 24576 + 16384 * 7168 + 2 * 512 * 32768) // 8  # q_b, o; kv_b in bf16
    whole = 7168 * 1536 + 7168 * 576
    dense = 3 * 3 * 7168 * 18432 // 8 + 59 * expert // 8
    vocabulary = 2 * 2 * 129280 * 7168 // 8
    gates, mtp = 59 * 4 * 256 * 7168, 2 * 2 * 7168 * 7168
    weights = routed + 62 * (cut + whole) + dense + vocabulary + gates + mtp
    assert e.memory.weights == pytest.approx(weights, rel=0.03)  # scales and norms; two bytes in MTP
    per_token = 62 * 576 * 2
    free = 72e9 - e.memory.weights - e.memory.buffers
    assert e.cache_tokens == pytest.approx(free / per_token, abs=32)
    assert e.memory.total <= e.limit == 72_000_000_000

    memory, context, rows = 3350e9 * 0.9, 4383 + 605, 64
    reading = 16 * (1 - (1 - 8 / 256) ** rows)  # experts that 64 tokens select
    layer = (cut + whole + reading * expert + expert / 8 + gates / 59) / memory
    layer += max(rows * context * 1152 / memory, rows * context * 2 * 16 * 1088 / (989e12 * 0.67))
    hidden = rows * 7168 * 2
    layer += 2 * 7 / 8 * hidden / (450e9 * 0.8) + 2 * 15 / 16 * hidden / (50e9 * 0.8)
    assert e.decode.step == pytest.approx(61 * layer, rel=0.03)  # and three dense layers, the head
    assert e.decode.tokens_per_second == pytest.approx(64 / e.decode.step / 16)
    assert e.usd_output == pytest.approx(2.0 * 16 / 3600 * e.decode.step / 64 * 1e6)
    assert e.usd_input == pytest.approx(2.0 * 16 / 3600 * e.prefill.step / 8192 * (1 - 0.563) * 1e6)


@pytest.mark.parametrize(
    ("gpu", "workload", "gpus", "published"),
    [
        ("h800", PUBLISHED, (32, 144), (73_700, 14_800)),
        ("h100", Workload(2000, 100, 0.0, 0.1), (32, 72), (52_300, 22_300)),
    ],
)
def test_estimate_bounds_published_results(
    gpu: str, workload: Workload, gpus: tuple[int, int], published: tuple[int, int]
) -> None:
    """A roofline below published results, or more than three times above, would be wrong."""
    e = groups(target(gpu=gpu, redundant=32), *gpus, workload, 2.0)
    assert published[0] < e.prefill_with_hits * 8 < 3 * published[0]
    assert published[1] < e.decode.node() < 3 * published[1]
    assert e.decode.step <= workload.step_limit
    assert e.layout is None and e.memory.total <= e.limit


def test_sparse_attention_is_cheaper_beyond_its_length() -> None:
    sparse, dense = (_Group(t, ShardPlan.spread(t.config, 144)).stages[0] for t in _both())
    indexer = 1536 * 64 * 128 + 7168 * (128 + 64)
    assert sum(p.weights for p in sparse.parts[3]["attention"]) - indexer == sum(
        p.weights for p in dense.parts[3]["attention"]
    )
    read = (2048 * 576 + 100_000 * 128) * 2
    assert sparse.decode_attention(3, 1, 100_000) == pytest.approx(read / (3350e9 * 0.9))
    for prompt, output, cheaper in ((100_000, 1000, True), (1500, 500, False)):
        load = Workload(prompt, output, 0.0, 0.1)
        ours, other = (groups(t, 32, 144, load, 2.0) for t in _both())
        assert (ours.usd_input < other.usd_input) == (ours.usd_output < other.usd_output) == cheaper
        assert any("at most 2,048 keys" in line for line in ours.assumptions)
        assert not any("sparse" in line for line in other.assumptions)


def test_sparse_attention_to_entries_is_assumed_of_v4() -> None:
    load = Workload(100_000, 1000, 0.0, 0.1)
    found = groups(target("deepseek-v4-flash", "h800", redundant=32), 32, 144, load, 2.0)
    assert any("sparse attention: a token attends to at most 512 entries" in a for a in found.assumptions)


def _both() -> tuple[Target, Target]:
    return target("deepseek-v3.2", "h800", redundant=32), target("deepseek-v3", "h800", redundant=32)


LAYOUTS = st.sampled_from([Layout(8, 1, 16), Layout(8, 1, 32), Layout(1, 1, 32), Layout(4, 1, 32, True)])


@settings(max_examples=12, deadline=None)
@given(LAYOUTS, st.integers(70, 200), st.integers(0, 100), st.integers(200, 20_000))
def test_more_memory_and_smaller_caches_never_cost_more(
    layout: Layout, memory: int, more: int, prompt: int
) -> None:
    load = Workload(prompt, 500, 0.0, 0.2)

    def run(**fields: Any) -> Estimate:
        return serving(target(**fields), layout, load, 2.0)

    small, large = run(memory=memory), run(memory=memory + more)
    eight = run(memory=memory, cache="fp8")
    for better in (large, eight):
        assert better.cache_tokens >= small.cache_tokens
        assert better.decode.tokens_per_step >= small.decode.tokens_per_step
        assert better.usd_output <= small.usd_output * (1 + 1e-9)
        assert better.memory.weights == small.memory.weights
    assert eight.cache_tokens > 1.9 * small.cache_tokens


@settings(max_examples=3, deadline=None)
@given(
    st.sampled_from(["deepseek-v2", "moonlight-16b", "glm-4.7-flash"]),
    st.integers(40, 180),
    st.integers(0, 100),
)
def test_smallest_deployment_shrinks_with_memory_and_bits(name: str, memory: int, more: int) -> None:
    load = Workload(2000, 500, 0.5, 0.2)

    def run(**fields: Any) -> Estimate:
        return smallest(target(name, **fields), load, 2.0, replace(load, cache_hit=0.0))

    small, large, four = (
        run(memory=memory),
        run(memory=memory + more),
        run(memory=memory, quantization="int4"),
    )
    assert large.decode.gpus <= small.decode.gpus and four.decode.gpus <= small.decode.gpus
    assert small.memory.total <= small.limit
    weights = (small.memory.weights * small.decode.gpus, four.memory.weights * four.decode.gpus)
    assert weights[1] < 0.7 * weights[0]


def test_formats_of_the_checkpoint_count() -> None:
    """Kimi K2.5 stores experts in INT4: half the GPUs of Kimi K2's FP8."""
    load = Workload(4383, 1210, 0.0, 0.2)
    four, eight = (smallest(target(name, "h200"), load, 2.0, None) for name in ("kimi-k2.5", "kimi-k2"))
    assert (four.decode.gpus, eight.decode.gpus) == (8, 16)
    routed = 60 * 384 * 3 * 7168 * 2048 * (0.5 + 4 / 32)  # a float32 scale per 32 weights on the GPU
    assert routed / 8 < four.memory.weights < 1.2 * routed / 8


def test_limits_are_errors_that_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"8 x h100 need [\d.]+ GB each .* expected more GPUs"):
        serving(target(), Layout(8, 1, 8), PUBLISHED, 2.0)
    with pytest.raises(ValueError, match=r"user_rate: got 5000; expected at most \d+\.\d: a decode step"):
        serving(target(), Layout(8, 1, 16), replace(PUBLISHED, step_limit=1 / 5000), 2.0)
    with pytest.raises(ValueError, match=r"no layout of up to 1 GPUs of 72\.0 GB fits"):
        smallest(target(), PUBLISHED, 2.0, None, most=1)
    with pytest.raises(ValueError, match="2 x h100 need"):
        groups(target(), 32, 2, PUBLISHED, 2.0)


def test_pipelines_wait_for_their_stages() -> None:
    """A step below 64 rows per micro-batch passes the stages one after another."""
    small = target("moonlight-16b", sequences=32)
    one = _Replica(small, ShardPlan.build(small.config, Layout(1, 1, 1)))
    two = _Replica(small, ShardPlan.build(small.config, Layout(1, 2, 1)))
    steps = [r.phase(32, PUBLISHED, decode=True) for r in (one, two)]
    assert steps[1].step == pytest.approx(steps[0].step, rel=0.02)
    assert steps[1].tokens_per_second == pytest.approx(steps[0].tokens_per_second / 2, rel=0.02)


def test_measured_ceilings_replace_declared_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[device.h100]\nbandwidth = 3000\n[share]\nbandwidth = 1.0\n")
    devices, shares = load_devices(file)
    assert devices["h100"].bandwidth == 3000 and devices["h100"].measured
    assert devices["h100"].memory == 80 and shares.bandwidth == 1.0
    file.write_text("[device.mine]\nbandwidth = 3000\n")
    with pytest.raises(ValueError, match=r"device.mine has \['bandwidth'\]; expected"):
        load_devices(file)
    for value in ("inf", "nan", "0", "true", '"3"'):
        file.write_text(f"[device.h100]\nbandwidth = {value}\n")
        with pytest.raises(ValueError, match=r"device.h100.bandwidth: got .*; expected a number > 0"):
            load_devices(file)


def plan(*words: str) -> dict[str, Any]:
    run = CliRunner().invoke(app, [*words, "--json"])
    assert run.exit_code == 0, run.output
    document: dict[str, Any] = json.loads(run.stdout)
    return document


def test_command_honours_what_it_is_given() -> None:
    base = ("deepseek-v3", "--gpu", "h100", "--price", "2", "--tp", "8", "--ep", "16")
    plain = plan(*base)
    assert plain["layout"] == {"tp": 8, "pp": 1, "ep": 16, "dp_attention": False}
    assert plain["serve"].startswith("farthing serve MODEL --backend gpu --tp 8 --ep 16")
    fewer = plan(*base, "--memory", "60GB")
    assert fewer["limit"] == 60_000_000_000 and fewer["cache_tokens"] < plain["cache_tokens"]
    eight = plan(*base, "--kv-cache-dtype", "fp8")
    assert eight["cache_tokens"] > 1.9 * plain["cache_tokens"] and eight["usd_output"] < plain["usd_output"]
    copies = plan(*base, "--redundant-experts", "16")
    extra = 59 * 3 * 7168 * 2048  # one more expert per layer
    assert copies["memory"]["weights"] - plain["memory"]["weights"] == pytest.approx(extra, rel=0.001)
    few = plan(*base, "--max-num-seqs", "4", "--kv-tokens", "40000")
    assert few["decode"]["tokens_per_step"] == 4 and few["cache_tokens"] == 40_000
    assert few["usd_output"] > plain["usd_output"]
    rounded = plan("glm-5", *base[1:], "--quantization", "int4")
    assert rounded["memory"]["weights"] < 40e9
    assert ceil(plain["memory"]["total"]) <= plain["limit"]


def test_command_labels_its_estimate_and_prints_memory() -> None:
    run = CliRunner().invoke(app, ["deepseek-v3", "--gpu", "h100", "--price", "2"])
    assert run.exit_code == 0, run.output
    text = " ".join(run.output.split())
    for part in (
        "ESTIMATE, not measured",
        "declared ceilings of h100",
        "memory per GPU: weights",
        "of 72.00 GB usable",
        "smallest deployment that fits: farthing serve MODEL --backend gpu",
        "parameters: fp8 99.7%",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--memory 90GB", "memory: got '90GB'; expected at most the 80GB of h100"),
        ("--quantization int4", "does not round fp8 weights"),
        ("--backend cpu", "backend: got 'cpu'; expected 'gpu' with --price"),
        ("--experts-on cpu", "experts-on: got 'cpu'; expected none with --price"),
        ("--dtype float32", "dtype: got 'float32'; expected auto or bfloat16"),
        ("--prefill-gpus 32", "decode-gpus is not set; expected both"),
        ("--prefill-gpus 32 --decode-gpus 144 --tp 2", "prefill-gpus is set with a layout"),
        ("--tp 8 --redundant-experts 8", "redundant-experts: got 8; expected 0, or a multiple of ep"),
        ("--tp 8 --ep 16 --dp-attention --cache-hit 0.5", "expected --cache-hit 0"),
        ("--max-model-len 4096", "prompt and output: got 4383 and 1210; expected at most 4096"),
        ("--max-model-len 999999", "max-model-len: got 999999; expected at most the model's 163840"),
    ],
)
def test_command_refuses_what_it_cannot_honour(options: str, message: str) -> None:
    run = CliRunner().invoke(app, ["deepseek-v3", "--gpu", "h100", "--price", "2", *options.split()])
    assert run.exit_code == Exit.INPUT
    assert message in run.output


def test_the_serve_command_has_the_limits_that_were_planned_for() -> None:
    base = ["kimi-k2.5", "--gpu", "h200", "--price", "3.5", "--tp", "8", "--json"]
    limits = ["--kv-tokens", "50000", "--max-num-batched-tokens", "1024"]
    document = json.loads(CliRunner().invoke(app, [*base, *limits]).stdout)
    assert document["serve"].endswith("--max-num-batched-tokens 1024 --num-blocks 3125")
    bounded = json.loads(CliRunner().invoke(app, [*base, "--memory", "100GB"]).stdout)
    assert f"--num-blocks {bounded['cache_tokens'] // 16}" in bounded["serve"]
    assert "--num-blocks" not in json.loads(CliRunner().invoke(app, base).stdout)["serve"]
