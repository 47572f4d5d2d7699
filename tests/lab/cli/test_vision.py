"""`farthing eval` of two exported networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from farthing.cli.app import app
from farthing_lab.vision.module import quantize_int8
from farthing_lab.vision.onnx import export_qdq


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    x = torch.randn(70, 3, 8, 8)
    quantized, _ = quantize_int8(model, [x])
    export_qdq(model, x[:1], tmp_path / "a.onnx")
    export_qdq(quantized, x[:1], tmp_path / "b.onnx")
    np.savez(tmp_path / "x.npz", images=x.numpy(), labels=model(x).argmax(1).numpy())
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["vision", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_top1_of_two_files(files: Path) -> None:
    a, b, data = files / "a.onnx", files / "b.onnx", files / "x.npz"
    code, text = run(a, b, "--data", data, "--max-drop", "60%", "--json")
    found = json.loads(text)
    assert code == 0 and found["top1_a"] == 1.0 and found["images"] == 70 and found["verdict"] == "pass"
    assert found["interval"][0] <= found["difference"] == found["top1_b"] - 1.0 <= found["interval"][1]


def test_errors_name_missing_arrays(files: Path) -> None:
    a, b = files / "a.onnx", files / "b.onnx"
    np.savez(files / "y.npz", images=np.zeros((2, 3, 8, 8), np.float32))
    np.savez(files / "z.npz", images=np.zeros((2, 8, 8), np.float32), labels=np.zeros(2, np.int64))
    for arguments, words in (
        ((a,), "B"),
        ((a, b), "--data"),
        ((a, b, "--data", files / "y.npz"), "labels"),
        ((a, b, "--data", files / "z.npz"), "[2, 8, 8]"),
        ((a, b, "--data", files / "none.npz"), "none.npz"),
    ):
        code, text = run(*arguments)
        assert code == 2 and words in text
