"""Rotary position embedding: plain, or extended, as with YaRN (Peng et al. 2023, sections 3.2-3.4).

Legend: r rotary head size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from farthing.lazy import np
from farthing.model.config import ModelConfig, RopeConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rope_table(config: ModelConfig) -> NDArray[np.float32]:
    """(cos, sin) of every position and pair, float32 [2, length, r/2]."""
    rope, length = config.rope, config.max_position_embeddings
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies(rope, config.attention.rotary_width)
    magnitude = 1.0
    if rope.factor is not None and rope.kind == "yarn":
        magnitude = _cos_sin_factor(rope)
    table = np.empty((2, *angles.shape), np.float32)
    np.cos(angles, out=table[0])
    np.sin(angles, out=table[1])
    table *= np.float32(magnitude)
    return table


def frequencies(rope: RopeConfig, dim: int) -> NDArray[np.float32]:
    """Radians per position of every pair, float32 [r/2], between theta_i and theta_i / factor."""
    # Powers in float64, rounded once: an error of a frequency grows with the position.
    powers = rope.theta ** (np.arange(0, dim, 2) / dim)
    theta: NDArray[np.float32] = np.float32(1) / powers.astype(np.float32)
    if rope.factor is None:
        return theta
    if rope.kind == "linear":
        return theta / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, theta)

    def pair_that_turns(rotations: float) -> float:
        return (
            dim
            * math.log(rope.original_max_position / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = np.float32(max(high - low, 0.001))
    ramp = ((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / width).clip(0, 1)
    mixed: NDArray[np.float32] = theta * (1 - ramp) + theta / np.float32(rope.factor) * ramp
    return mixed


def _llama3(rope: RopeConfig, theta: NDArray[np.float32]) -> NDArray[np.float32]:
    """By the turns of a pair within the original context: few are scaled by the factor, many are not."""
    assert rope.factor is not None
    low, high = rope.low_frequency, rope.high_frequency
    turns = np.float32(rope.original_max_position) / (np.float32(2 * math.pi) / theta)
    ramp = ((turns - np.float32(low)) / np.float32(high - low)).clip(0, 1).astype(np.float32)
    mixed: NDArray[np.float32] = (1 - ramp) * theta / np.float32(rope.factor) + ramp * theta
    return mixed


def score_scale(config: ModelConfig) -> float:
    """Latent attention: (nope + r)^-1/2, times m(mscale_all_dim)^2 under YaRN (V3: 0.135234)."""
    scale = float(config.latent.qk_head_dim**-0.5)
    rope = config.rope
    if rope.factor is not None and rope.mscale_all_dim:
        scale *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, a: float) -> float:
    return 0.1 * a * math.log(factor) + 1.0 if factor > 1 else 1.0


def _cos_sin_factor(rope: RopeConfig) -> float:
    assert rope.factor is not None
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)
