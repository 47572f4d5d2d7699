"""What is read of a checkpoint without importing torch."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import CheckpointError

READ = """
import sys
from pathlib import Path
from farthing.checkpoint import Checkpoint

found = Checkpoint.open(Path(sys.argv[1]), arrays=True)
assert found.has("a") and not found.has("b")
assert (found.shape("a"), found.nbytes("a"), found.dtype("a")) == ((3, 4), 24, "BF16")
assert found.plain() and found.tensor("a", (3, 4)).shape == (3, 4)
assert len(found.fingerprint()) == 64
assert "torch" not in sys.modules, "torch was imported"
"""


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.bool])
def test_arrays_suffice_only_where_numpy_reads_every_tensor(tmp_path: Path, other: torch.dtype) -> None:
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(3).to(other)}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    found = Checkpoint.open(tmp_path, arrays=True)
    found.tensor("a")
    with nullcontext() if found.plain() else pytest.raises(CheckpointError, match="b: found"):
        found.tensor("b")


def test_progress_counts_every_tensor_once_and_ends_with_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(300, 4), "b": torch.zeros(100, 4)}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    found, seen = Checkpoint.open(tmp_path), list[tuple[str, int]]()
    found.watch(lambda what, done, total: seen.append((what, round(100 * done / total))))
    for name in "aab":
        found.tensor(name)
    assert seen == [("loading", 73), ("loading", 98)]


def test_headers_and_arrays_need_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 4).bfloat16()}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    command = [sys.executable, "-c", READ, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
