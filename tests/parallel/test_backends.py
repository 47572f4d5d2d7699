"""The example of docs/design/backends.md: a backend in a separate package, found by its entry point."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from safetensors.torch import save_file

from farthing.engine.request import SamplingParams
from farthing.llm import LLM
from farthing.model.config import ModelConfig
from farthing.model.parameters import random_parameters
from farthing.ops.select import select
from tests.tiny import SMALL_V3

BACKEND = '''
    """Projections on a device of its own (here: NumPy); the reference computes the rest."""

    import numpy as np
    import torch
    from farthing.ops.reference import ReferenceOps


    class NumpyOps(ReferenceOps):
        calls = 0

        def __init__(self, dtype):
            super().__init__(dtype)
            self.name = "numpy"

        def pack_linear(self, name, weights, heads=1):
            return np.concatenate([w.dequantize().numpy() for w in weights()])

        def linear(self, x, weight, norm=None, residual=None):
            NumpyOps.calls += 1
            if norm is not None:
                x = self.rms_norm(x, norm)
            y = torch.from_numpy(x.numpy() @ weight.T)
            return y if residual is None else residual + y


    def create(dtype, threads, quantization, packed):
        if dtype not in (None, torch.float32):
            raise ValueError(f"dtype {dtype} is not supported by backend 'numpy'; expected float32")
        if quantization or packed:
            raise ValueError("backend 'numpy' serves weights as they are stored; expected None")
        return NumpyOps(torch.float32)
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result of `pip install farthing-numpy` on the path, for this process and its children."""
    site = tmp_path / "site"
    meta = site / "farthing_numpy-1.0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: farthing-numpy\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[farthing.ops]\nnumpy = farthing_numpy\n")
    (site / "farthing_numpy.py").write_text(dedent(BACKEND))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.delitem(sys.modules, "farthing_numpy", raising=False)
    return site


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    raw = SMALL_V3 | dict(num_experts_per_tok=3, topk_group=2)
    (path / "config.json").write_text(json.dumps(raw))
    save_file(random_parameters(ModelConfig.from_json(raw), seed=7), path / "model.safetensors")
    return path


def tokens(model: Path, **options: Any) -> list[int]:
    fixed: dict[str, Any] = dict(skip_tokenizer_init=True, num_blocks=16, threads=1)
    with LLM(model, **fixed, **options) as llm:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        return list(llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].token_ids)


def test_installed_backend_serves(installed: Path, model: Path) -> None:
    expected = tokens(model, backend="reference", dtype="float32")
    assert tokens(model, backend="numpy") == expected
    assert sys.modules["farthing_numpy"].NumpyOps.calls > 0


@pytest.mark.slow
def test_installed_backend_serves_on_two_ranks(installed: Path, model: Path) -> None:
    expected = tokens(model, backend="reference", dtype="float32")
    assert tokens(model, backend="numpy", tensor_parallel_size=2) == expected


def test_installed_backend_is_listed_and_its_errors_are_shown(installed: Path) -> None:
    with pytest.raises(ValueError, match=r"^backend: got 'abacus'; expected 'auto' or one of .*'numpy'"):
        select("abacus")
    with pytest.raises(ValueError, match="serves weights as they are stored"):
        select("numpy", quantization="int8")
