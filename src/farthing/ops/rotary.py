"""Rotary embedding in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x [..., r] by cos, sin [..., r/2], in float32."""
    x32 = x.float()
    a, b = (x32[..., 0::2], x32[..., 1::2]) if interleaved else x32.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return out.to(x.dtype)
