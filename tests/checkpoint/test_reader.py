"""What is read of a checkpoint without importing torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

READ = """
import sys
from pathlib import Path
from farthing.checkpoint import Checkpoint

found = Checkpoint.open(Path(sys.argv[1]))
assert found.has("a") and not found.has("b")
assert (found.shape("a"), found.nbytes("a"), found.dtype("a")) == ((3, 4), 24, "BF16")
assert found.array("a", (3, 4)).shape == (3, 4)
assert len(found.fingerprint()) == 64
assert "torch" not in sys.modules, "torch was imported"
"""


def test_headers_and_arrays_need_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 4).bfloat16()}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    command = [sys.executable, "-c", READ, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
