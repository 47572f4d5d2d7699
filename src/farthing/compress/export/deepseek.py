"""The format in which DeepSeek released V3 and R1: FP8 blocks with `weight_scale_inv`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from farthing.ops.weights import Weight


def encode_deepseek(module: str, weight: Weight) -> dict[str, Tensor]:
    """The tensors of one module. Raises ValueError if it is neither dense nor FP8."""
    if weight.format == "dense":
        return {f"{module}.weight": weight.data}
    if weight.format != "fp8" or weight.scale is None:
        raise ValueError(
            f"{module}: got {weight.format}; expected FP8 blocks or dense weights for DeepSeek's format"
        )
    if not bool(((weight.scale > 0) & weight.scale.isfinite()).all()):
        raise ValueError(f"{module}: a scale is zero, negative or not finite; expected finite scales > 0")
    return {f"{module}.weight": weight.data, f"{module}.weight_scale_inv": weight.scale}


def fp8_config() -> dict[str, Any]:
    """`quantization_config` as in DeepSeek-V3."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
