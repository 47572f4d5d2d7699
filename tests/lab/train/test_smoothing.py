"""Smoothing changes no output of the float model and equalizes the channels of every 4-bit input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from farthing.model.config import ModelConfig
from farthing_lab.train.lsq import Precision
from farthing_lab.train.model import DeepSeekLM
from farthing_lab.train.qat import smooth
from farthing_lab.train.qat_model import QatConfig, QatModel


@pytest.fixture
def uneven(wide: ModelConfig) -> DeepSeekLM:
    """A random model whose norms and up projections make channels of very different size."""
    torch.manual_seed(0)
    model = DeepSeekLM(wide)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
            elif "norm" in name:
                p.copy_(torch.randn_like(p).exp())
            if name.endswith("up_proj.weight"):
                p *= torch.randn(len(p), 1).exp()
    return model.eval()


def outputs(model: DeepSeekLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the trunk and of the MTP layer."""
    with torch.no_grad():
        hidden = model(tokens[:, :-1])
        return hidden, model.draft(hidden[:, :-1], tokens[:, 1:-1])


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_float_model_is_unchanged(uneven: DeepSeekLM, strength: float) -> None:
    tokens = torch.randint(0, uneven.cfg.vocab_size, (2, 33))
    before, weights = outputs(uneven, tokens), copy.deepcopy(uneven.state_dict())
    smooth(uneven, tokens, strength)
    for found, expected in zip(outputs(uneven, tokens), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    same = all(torch.equal(weights[name], p) for name, p in uneven.state_dict().items())
    assert same == (strength == 0)


def test_full_strength_equalizes_channels(uneven: DeepSeekLM) -> None:
    tokens = torch.randint(0, uneven.cfg.vocab_size, (2, 33))
    layer = uneven.layers[1]
    seen: list[Tensor] = []

    def spread() -> float:
        seen.clear()
        outputs(uneven, tokens)
        rms = seen[0].flatten(0, 1).square().mean(0).sqrt()
        return float(rms.max() / rms.median())

    layer.post_attention_layernorm.register_forward_hook(lambda *args: seen.append(args[2]))
    assert spread() > 3
    smooth(uneven, tokens, 1.0)
    assert spread() < 1.01


def test_smoothing_reduces_the_loss_of_4_bit_inputs(uneven: DeepSeekLM) -> None:
    tokens = torch.randint(0, uneven.cfg.vocab_size, (2, 33))
    exact = outputs(uneven, tokens)[0]

    def error(model: DeepSeekLM) -> float:
        student = QatModel(model, QatConfig(group=32)).eval()
        student.start(Precision(16, 4))
        return float((outputs(student.net, tokens)[0] - exact).norm() / exact.norm())

    plain = error(copy.deepcopy(uneven))
    smooth(uneven, tokens, 0.5)
    assert error(uneven) < 0.9 * plain


def test_invalid_strength_is_rejected(uneven: DeepSeekLM) -> None:
    with pytest.raises(ValueError, match=r"smoothing: got 1\.5; expected 0"):
        smooth(uneven, torch.zeros(1, 9, dtype=torch.int64), 1.5)
