"""FP8 blocks 128x128 (DeepSeek-V3 section 3.3) that cannot overflow."""

from __future__ import annotations

from torch import Tensor

from farthing.checkpoint.fp8 import quantize_blocks
from farthing.ops.weights import Weight


def quantize_fp8(w: Tensor, name: str = "weight", ue8m0: bool = False) -> Weight:
    """w [N, K] -> e4m3 with one float32 scale per block; the last blocks may be ragged.

    Raises ValueError with the tensor's name for NaN, infinity or a value out of float32 range.
    """
    if not bool(w.float().isfinite().all()):
        raise ValueError(f"{name} has NaN or infinity; expected finite numbers")
    data, scale = quantize_blocks(w, ue8m0=ue8m0)
    return Weight("fp8", data, scale)
