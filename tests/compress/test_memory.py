"""Compressing a checkpoint larger than the allowed memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farthing.checkpoint.reader import Checkpoint
from farthing.compress.gguf import export_gguf
from tests.compress.conftest import write_model
from tests.compress.test_gguf import with_tokenizer

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
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
def gate(path):
    corpus = load_corpus(Path(sys.argv[3]), path, ModelConfig.from_directory(path), 64, 600)
    compare_in_turn(path, path, corpus)
    return peak_memory()
print(gate(Path(sys.argv[1])), gate(resolve_model(sys.argv[2])))
"""
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "head_dim": 64,
    "vocab_size": 264, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "torch_dtype": "float32", "hidden_size": 256, "moe_intermediate_size": 512,
    "num_hidden_layers": 14,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe", "gguf"])
def test_the_gate_holds_one_layer_of_one_model(
    kind: str, model_dir: Path, large: Path, data: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    if kind != "deepseek_v3":
        large = write_model(tmp_path / "m", base=QWEN)
        assert Checkpoint.open(large).stored_bytes() > 1.4 * LIMIT
    if kind == "gguf":
        export_gguf(with_tokenizer(large, 264), tmp_path / "m.gguf")
        large = tmp_path / "m.gguf"
    args = [sys.executable, "-c", GATE, str(model_dir), str(large), str(data)]
    result = subprocess.run(args, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    before, after = (int(x) for x in result.stdout.split())
    assert after - before < LIMIT
