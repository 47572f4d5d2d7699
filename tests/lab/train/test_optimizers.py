"""Muon: orthogonalization, shapes, decay, descent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from farthing.model.config import ModelConfig
from farthing_lab.train.loop import Muon, orthogonalize, split_parameters
from farthing_lab.train.model import DeepSeekLM


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32), (5, 3, 8, 24)])
def test_singular_values_are_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    m = torch.randn(shape) * torch.logspace(0, -1, shape[-1])
    out = orthogonalize(m, steps=6, dtype=torch.float32)
    values = torch.linalg.svdvals(out)
    assert out.shape == m.shape
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_directions_are_preserved() -> None:
    """The result is U V^T of the input: the same singular vectors, whatever the scale of the input."""
    torch.manual_seed(0)
    m = torch.randn(24, 40) * 1e-3
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    out = orthogonalize(m, steps=6, dtype=torch.float32)
    diagonal = u.T @ out @ vt.T
    assert (diagonal - torch.diag(diagonal.diag())).abs().max() < 1e-3


def test_stack_is_processed_per_matrix() -> None:
    torch.manual_seed(0)
    stack, single = nn.Parameter(torch.zeros(3, 8, 12)), [nn.Parameter(torch.zeros(8, 12)) for _ in range(3)]
    gradient = torch.randn(3, 8, 12)
    stack.grad = gradient.clone()
    for p, g in zip(single, gradient, strict=True):
        p.grad = g.clone()
    Muon([stack], lr=0.1).step()
    Muon(single, lr=0.1).step()
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in single]))


def test_weight_decay_is_decoupled() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    Muon([p], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.data, torch.full((4, 4), 0.95))


def test_fits_a_linear_map() -> None:
    torch.manual_seed(0)
    target, x = torch.randn(8, 8), torch.randn(64, 8)
    p = nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([p], lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (x @ (p - target).T).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.01


def test_vectors_are_rejected() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_parameters_are_split_once(tiny: ModelConfig) -> None:
    model = DeepSeekLM(tiny)
    muon, adam = split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(muon) + len(adam) == len(names)
    plain = {names[id(p)] for p in adam}
    assert "embed_tokens" in plain
    assert "layers.1.mlp.gate.weight" in plain
    assert "layers.0.mlp.gate_proj.weight" not in plain
    assert "layers.1.mlp.gate_up" not in plain
