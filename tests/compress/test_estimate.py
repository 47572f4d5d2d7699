"""What a run will take, before it begins."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing.checkpoint.reader import Checkpoint
from farthing.cli import app as cli
from farthing.compress.api import Options, compress
from farthing.compress.estimate import _by_layer, _work, estimate
from farthing.compress.needs import memory_needed
from farthing.compress.recipe import RECIPES
from farthing.compress.sensitivity import ROWS, SAMPLE
from farthing.model.config import ModelConfig


@pytest.mark.parametrize("name", ["int4", "int8", "fp8-block", "auto"])
def test_config_alone_is_enough(
    name: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ("_TOKENS", "_ROWS", "_SIDE"):  # of the products that are timed
        monkeypatch.setattr(f"farthing.compress.estimate.{size}", 128)
    shutil.copy(model_dir / "config.json", tmp_path)
    found = estimate(tmp_path, tmp_path / "out", RECIPES[name], "auto", 1000)
    document = found.to_json()
    config = ModelConfig.from_directory(model_dir)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    assert len(document["layer_seconds"]) == layers and min(found.layer_seconds) > 0 < found.gate_seconds
    assert document["hours"] >= 0 and found.memory > 0 and (found.disk is None) == (name == "auto")
    without = estimate(tmp_path, tmp_path / "out", RECIPES[name], "auto", 0)
    assert without.gate_seconds == 0


def test_disk_is_that_of_the_result(model_dir: Path, tmp_path: Path) -> None:
    found = estimate(model_dir, tmp_path / "out", RECIPES["int4-rtn"], "auto", 0)
    compress(model_dir, tmp_path / "out", RECIPES["int4-rtn"], Options(gate=False))
    result = Checkpoint.open(tmp_path / "out")
    assert found.disk == pytest.approx(sum(map(result.nbytes, result.names())), rel=0.02)


def test_operations_follow_tokens_and_shapes(model_dir: Path) -> None:
    config = ModelConfig.from_directory(model_dir)
    matrices = [("model.layers.0.mlp.gate_proj", (30, 20)), ("model.layers.0.mlp.up_proj", (30, 20))]
    one = _work(config, RECIPES["int8"], 0, matrices)
    assert one.products == 4096 * 2 * 30 * 20 and one.moments == one.factors == 0
    two = _work(config, RECIPES["int4"], 0, matrices)  # two passes, and second moments of the shared input
    assert two.products == 2 * 32768 * 2 * 30 * 20
    assert two.moments == 32768 * 20**2 and two.rounding == 2 * 30 * 20**2
    assert two.factors == 20**3 and two.sorting == 20**2
    expert = [("model.layers.1.mlp.experts.0.gate_proj", (30, 20))]
    share = config.num_experts_per_tok / (config.n_routed_experts or 1)
    assert _work(config, RECIPES["int8"], 1, expert).products == 4096 * share * 30 * 20
    assert len(_by_layer(config)) == config.num_hidden_layers + config.num_nextn_predict_layers


def test_memory_of_auto_counts_what_passes_through_every_layer(model_dir: Path) -> None:
    """States of the judged text, once per layer that was rounded, and distributions over the vocabulary."""
    config = ModelConfig.from_directory(model_dir)
    shapes = [(f"model.layers.0.mlp.{part}_proj.weight", (64, 64)) for part in ("gate", "up", "down")]

    def needed(name: str, config: ModelConfig) -> int:
        return memory_needed(shapes, config, RECIPES[name])

    states = 4 * SAMPLE * config.hidden_size
    deeper = replace(config, num_hidden_layers=config.num_hidden_layers + 100)
    assert needed("auto", deeper) - needed("auto", config) >= 100 * states
    assert needed("int4", deeper) == needed("int4", config)
    wider = replace(config, vocab_size=config.vocab_size + 100_000)
    assert needed("auto", wider) - needed("auto", config) >= 4 * ROWS * 3 * 100_000


def test_an_estimate_is_printed_as_sentences(model_dir: Path) -> None:
    command = ["compress", str(model_dir), "--recipe", "int4-rtn", "--estimate", "--no-gate"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    layers = r"on this machine: \d+ layers of up to [\d.]+ minutes, and no comparison\."
    assert re.fullmatch(rf"Compression takes about [\d.]+ minutes {layers}", first)
    sizes = r"memory \([\d.]+ GB are available\) and [\d.]+ GB of disk \([\d.]+ GB are free\)\."
    assert re.fullmatch(rf"It needs [\d.]+ GB of {sizes}", second)
