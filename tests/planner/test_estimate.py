"""The estimate: manual calculation, comparison with published deployments, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing.cli.plan import app
from farthing.model import ModelConfig
from farthing.planner.estimate import Workload, _Costs, estimate, load_devices
from farthing.planner.published import published_config
from tests.tiny import V3

CONFIG = ModelConfig.from_json(V3)
DEVICES, SHARES = load_devices()


def test_parts_match_manual_calculation() -> None:
    costs = _Costs(CONFIG, DEVICES["h800"], SHARES, gpus=144, redundant=32)
    assert costs.experts == 2
    assert costs.expert == 3 * 7168 * 2048
    projection = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    assert costs.projection == projection
    # One token: two experts' weights are read; arithmetic for 8 of 288 copies is negligible.
    reads = 3 * costs.expert / (3350e9 * 0.9)
    assert costs.feed_forward(1) == pytest.approx(reads)
    # With 128 heads, attention over the latent cache is barely compute-bound.
    attention = costs.decode_attention(1, 5000)
    assert attention == pytest.approx(2 * 5000 * 128 * (512 + 576) / (989e12 * 0.67))
    assert attention == pytest.approx(5000 * 576 * 2 / (3350e9 * 0.9), rel=0.15)
    assert costs.exchanged(10, 8) == pytest.approx(10 * 8 * 7168 * 3 / 40e9)


@pytest.mark.parametrize(
    ("device", "workload", "groups", "published"),
    [
        ("h800", Workload(4383, 1210, 0.563, 1 / 21), (32, 144), (73_700, 14_800)),
        ("h100", Workload(2000, 100, 0.0, 0.1), (32, 72), (52_300, 22_300)),
    ],
)
def test_estimate_bounds_published_results(
    device: str, workload: Workload, groups: tuple[int, int], published: tuple[int, int]
) -> None:
    """A roofline below published results, or more than three times above, would be wrong."""
    e = estimate(CONFIG, DEVICES[device], SHARES, workload, 2.0, *groups)
    assert published[0] < e.prefill_with_hits * 8 < 3 * published[0]
    assert published[1] < e.decode.node() < 3 * published[1]
    assert e.usd_output == pytest.approx(2.0 / 3600 / e.decode.tokens_per_second * 1e6)
    assert e.decode.tokens_per_gpu / e.decode.tokens_per_second <= workload.step_limit


def test_sparse_attention_is_cheaper_beyond_its_length() -> None:
    raw = published_config("deepseek-v3.2")
    assert raw is not None
    sparse = ModelConfig.from_json(raw)
    costs = _Costs(sparse, DEVICES["h800"], SHARES, gpus=144, redundant=32)
    assert costs.cache_bytes == 61 * (576 + 128) * 2
    assert costs.projection - _Costs(CONFIG, DEVICES["h800"], SHARES, 144, 32).projection == (
        1536 * 64 * 128 + 7168 * (128 + 64)
    )
    read = (2048 * 576 + 100_000 * 128) * 2
    assert costs.decode_attention(1, 100_000) == pytest.approx(read / (3350e9 * 0.9))
    for prompt, output, cheaper in ((100_000, 1000, True), (1500, 500, False)):
        load = Workload(prompt, output, 0.0, 0.1)
        ours, dense = (estimate(c, DEVICES["h800"], SHARES, load, 2.0) for c in (sparse, CONFIG))
        assert (ours.usd_input < dense.usd_input) == (ours.usd_output < dense.usd_output) == cheaper
        assert ours.prefill.tokens_per_second > dense.prefill.tokens_per_second or not cheaper
        assert any("at most 2,048 keys" in line for line in ours.assumptions)
        assert not any("sparse" in line for line in dense.assumptions)


def test_measured_ceilings_replace_declared_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[device.h100]\nbandwidth = 3000\n[share]\nbandwidth = 1.0\n")
    devices, shares = load_devices(file)
    assert devices["h100"].bandwidth == 3000 and devices["h100"].measured
    assert devices["h100"].memory == 80 and shares.bandwidth == 1.0
    file.write_text("[device.mine]\nbandwidth = 3000\n")
    with pytest.raises(ValueError, match=r"device.mine has \['bandwidth'\]; expected"):
        load_devices(file)


def test_the_command_labels_its_estimate(tmp_path: Path) -> None:
    file = tmp_path / "deepseek-v3.json"
    file.write_text(json.dumps(V3))
    run = CliRunner().invoke(app, [str(file), "--gpu", "h100", "--price", "2"])
    assert run.exit_code == 0
    assert "ESTIMATE, not measured" in run.output
    assert "declared ceilings of h100" in run.output
    run = CliRunner().invoke(app, [str(file), "--gpu", "h100", "--price", "2", "--decode-gpus", "2"])
    assert run.exit_code == 1
    assert "expected more GPUs or more memory" in run.output
