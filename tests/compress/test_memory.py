"""Compressing a checkpoint larger than the allowed memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farthing.checkpoint.reader import Checkpoint
from tests.compress.conftest import write_model

LIMIT = 100 * 2**20  # bytes that a run may use beyond imports and a tiny model

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from farthing.compress.api import Options, compress, peak_memory
from farthing.compress.recipe import RECIPES
options = Options(calibration=Path(sys.argv[3]), gate=False)
compress(Path(sys.argv[1]), Path(sys.argv[4]) / "tiny", RECIPES["int8"], options)
before = peak_memory()
compress(Path(sys.argv[2]), Path(sys.argv[4]) / "large", RECIPES["int8"], options)
print(before, peak_memory())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many layers, larger than the limit."""
    path = write_model(
        tmp_path_factory.mktemp("large"), hidden_size=256, moe_intermediate_size=512, num_hidden_layers=14,
        n_routed_experts=8, num_nextn_predict_layers=0,
    )  # fmt: skip
    assert Checkpoint.open(path).stored_bytes() > 1.4 * LIMIT
    return path


@pytest.mark.slow
def test_one_layer_in_memory_at_a_time(model_dir: Path, large: Path, data: Path, tmp_path: Path) -> None:
    args = [sys.executable, "-c", SCRIPT, str(model_dir), str(large), str(data), str(tmp_path)]
    result = subprocess.run(args, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    before, after = (int(x) for x in result.stdout.split())
    assert after - before < LIMIT
    report = json.loads((tmp_path / "large" / "report.json").read_text())
    assert len(report["coverage"]) == 13


GATE = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from farthing.compress.api import compare_in_turn, load_corpus, peak_memory
from farthing.model.config import ModelConfig
def gate(path):
    corpus = load_corpus(Path(sys.argv[3]), path, ModelConfig.from_directory(path), 64, 600)
    compare_in_turn(path, path, corpus)
    return peak_memory()
print(gate(Path(sys.argv[1])), gate(Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_the_gate_holds_one_layer_of_one_model(model_dir: Path, large: Path, data: Path) -> None:
    args = [sys.executable, "-c", GATE, str(model_dir), str(large), str(data)]
    result = subprocess.run(args, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    before, after = (int(x) for x in result.stdout.split())
    assert after - before < LIMIT
