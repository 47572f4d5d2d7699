"""GPTQ of a training model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from farthing_lab.train.evaluate import distillation
from farthing_lab.train.export import load_checkpoint
from farthing_lab.train.lsq import Precision
from farthing_lab.train.qat_model import QatConfig, QatModel, round_by_gptq


def student_of(checkpoint: Path) -> QatModel:
    return QatModel(load_checkpoint(checkpoint), QatConfig(group=32)).eval()


def test_output_error_is_less_than_of_rounding_to_nearest(checkpoint: Path) -> None:
    torch.manual_seed(1)
    tokens, teacher = torch.randint(3, 300, (16, 33)), load_checkpoint(checkpoint).eval()

    def error(student: QatModel) -> float:
        """Relative error of the first layer, whose inputs are those of the float model."""
        with torch.no_grad():
            x = torch.nn.functional.embedding(tokens[:, :-1], teacher.embed_tokens)
            exact, found = [net.layers[0](x, net.turn[:32]) for net in (teacher, student.net)]
        return float((found - exact).square().sum() / (exact - x).square().sum())

    nearest, gptq = student_of(checkpoint), student_of(checkpoint)
    nearest.start(Precision(4, 8))
    round_by_gptq(gptq, tokens[:, :-1], Precision(4, 8))
    assert error(gptq) < error(nearest)
    with torch.no_grad():
        assert float(distillation(gptq.net, teacher, tokens)["main"]) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_on_the_grid_that_is_stored(checkpoint: Path, bits: int) -> None:
    student = student_of(checkpoint)
    round_by_gptq(student, torch.randint(3, 300, (4, 32)), Precision(4, bits))
    for name, w in student.weights().items():
        if name.startswith("mtp."):
            continue  # rounded to nearest by the quantizer, not moved
        quantizer = student.product_of(name).weight_quantizer
        torch.testing.assert_close(quantizer(w), w)
        wanted: Tensor = quantizer.integers(w)[0]
        assert quantizer.bits == 4 and wanted.abs().max() <= 8
    assert student.product_of("mtp.eh_proj").weight_quantizer.bits == 4
    with pytest.raises(ValueError, match="expected 4-bit weights"):
        round_by_gptq(student, torch.randint(3, 300, (1, 8)), Precision(8, 8))
