"""Rotary embedding for training: plain RoPE, with pairs as complex numbers.

Shapes: B sequences, T positions, r rotary part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farthing.model.config import ModelConfig


def rope_table(cfg: ModelConfig, length: int) -> Tensor:
    """exp(i angle) [length, r/2] complex64 of plain RoPE."""
    r = cfg.latent.qk_rope_head_dim
    frequency = cfg.rope.theta ** (-torch.arange(0, r, 2, dtype=torch.float32) / r)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE on interleaved pairs as complex numbers. x [B, T, heads, r]; turn [T, r/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE on pairs (x_i, x_{i + r/2}) of the first r elements of x [B, T, heads, d]; turn [T, r/2]."""
    half = turn.shape[1]
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], -1)
    cos, sin = turn.real[:, None], turn.imag[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest), -1).to(x.dtype)
