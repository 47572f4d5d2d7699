"""The estimate for CPU servers: counts by hand, errors, what is measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from farthing.cli import plan
from farthing.cli.errors import Exit
from farthing.cli.plan import app
from farthing.model.config import ModelConfig
from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.estimate import BANDWIDTH, Machine, estimate, published_config
from farthing.planner.footprint import Holder, stored_by_config
from farthing.planner.memory import PlannedModel
from farthing.planner.roofline import Workload

SERVER = Machine(sockets=2, cores=64, bandwidth=300.0, int8=400.0)
SHORT = Workload(128, 0)
OPTIONS = ["--cores", "64", "--sockets", "2", "--socket-bandwidth", "300", "--core-int8", "400"]


@pytest.fixture(scope="module")
def v3() -> PlannedModel:
    raw = published_config("deepseek-v3")
    assert raw is not None
    return PlannedModel.of(ShardPlan.build(ModelConfig.from_json(raw), Layout()), stored_by_config(raw))


def test_v3_matches_a_manual_count(v3: PlannedModel) -> None:
    found = estimate(v3, Holder("cpu", quantization="int4"), SERVER, SHORT, "bfloat16")
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    four_bits = 3 * 3 * 7168 * 18432 + 58 * 9 * 3 * 7168 * 2048
    eight_bits = 61 * attention + 129280 * 7168
    gates = 4 * 58 * 256 * 7168
    latents = 61 * 128 * 576 * 2
    expected = four_bits * (0.5 + 2 / 64) + eight_bits + gates + latents
    alone = found.steps[0]
    assert alone.gigabytes == pytest.approx(expected / 1e9, rel=0.01)
    assert alone.limit == pytest.approx(600 / alone.gigabytes, rel=0.01)  # bound by bytes
    assert (alone.low / alone.limit, alone.high / alone.limit) == pytest.approx(BANDWIDTH, rel=0.01)
    assert found.joins == 15 * 61
    active = four_bits + 61 * attention
    assert found.prefill < found.prefill_limit < SERVER.peak * 1e12 / (2 * active)


def test_more_of_everything_is_faster(v3: PlannedModel) -> None:
    holder, load = Holder("cpu", quantization="int4"), Workload(4096, 512)
    base = estimate(v3, holder, SERVER, load, "bfloat16")
    wide = estimate(v3, holder, replace(SERVER, bandwidth=600.0), load, "bfloat16")
    strong = estimate(v3, holder, replace(SERVER, cores=128), load, "bfloat16")
    assert wide.steps[0].limit > base.steps[0].limit
    assert strong.prefill_limit >= base.prefill_limit
    rates = [s.limit for s in base.steps]
    assert rates == sorted(rates)


def test_float_weights_are_refused(v3: PlannedModel) -> None:
    with pytest.raises(ValueError, match="weights in fp8; expected int4 or int8"):
        estimate(v3, Holder("cpu"), SERVER, SHORT, "bfloat16")


def test_command_says_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure", lambda: (2, 40.0, 450.0))
    run = CliRunner().invoke
    result = run(app, ["deepseek-v3", "--quantization", "int4", *OPTIONS])
    assert result.exit_code == 0, result.output
    assert "ESTIMATE" in result.output and "300 GB/s, given" in result.output
    words = ["deepseek-v3", "--quantization", "int4", *OPTIONS[:6], "--json"]
    document = json.loads(run(app, words).output)
    assert document["sources"] == {"bandwidth": "given", "int8": "measured on this machine with 2 threads"}
    assert document["machine"] == {"sockets": 2, "cores": 64, "bandwidth": 300.0, "int8": 450.0}


def test_bandwidth_measured_here_is_that_of_all_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure", lambda: (8, 40.0, 450.0))
    words = ["deepseek-v3", "--quantization", "int4", "--cores", "4", "--sockets", "2", "--json"]
    document = json.loads(CliRunner().invoke(app, words).output)
    assert document["machine"] == {"sockets": 2, "cores": 4, "bandwidth": 20.0, "int8": 450.0}
    assert document["sources"]["bandwidth"] == "measured on this machine with 8 threads"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--sockets", "2"], "sockets is set without --cores"),
        (["--core-int8", "9"], "core-int8 is set without --cores"),
        (["--cores", "4", "--dtype", "float32"], "compute: got 'auto' with dtype 'float32'"),
        (["--cores", "4", "--tp", "2"], "expected no --gpu, --price, --tp"),
        (["--cores", "4", "--core-int8", "9", "--socket-bandwidth", "9"], "quantization: got None"),
        (["--cores", "4", "--prompt", "200000"], "prompt and output: got 200000"),
        (
            ["--cores", "64", "--quantization", "int4"],
            "socket-bandwidth: got None with 1 x 64 cores; expected the GB/s of a socket, because this "
            "machine (2 cores) can only measure its own",
        ),
        *(
            (["--cores", "64", "--sockets", "2", name, value], f"{name[2:].replace('-', '_')}: got {value}")
            for name in ("--socket-bandwidth", "--core-int8")
            for value in ("inf", "nan", "0.0", "-1.0")
        ),
        *(
            (["--gpu", "h100", "--price", "2", name, value], f"{name[2:].replace('-', '_')}: got {value}")
            for name in ("--price", "--user-rate", "--cache-hit")
            for value in ("inf", "nan")
        ),
        (["--gpu", "h100", "--price", "0"], "price: got 0.0; expected a number > 0"),
        (["--memory", "infGB"], "memory: got 'infGB'"),
    ],
)
def test_options_that_cannot_be_honoured(
    words: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "measure", lambda: (2, 40.0, 450.0))
    result = CliRunner().invoke(app, ["deepseek-v3", *words])
    assert result.exit_code == Exit.INPUT
    assert error in " ".join(result.output.split())
