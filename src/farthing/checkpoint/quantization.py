"""The quantization_config of a config.json."""

from __future__ import annotations

from typing import Any

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.error import CheckpointError
from farthing.ops.weights import FP8_BLOCK


def read_quantization(quantization: Any) -> ct.Groups | None:
    """The schemes of compressed-tensors; None for DeepSeek's FP8 blocks; CheckpointError for others."""
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"config.json: quantization_config is {type(quantization).__name__}; expected an object"
        )
    method = quantization.get("quant_method")
    if method == ct.METHOD:
        return ct.Groups.from_json(quantization)
    if method != "fp8":
        raise CheckpointError(
            f"config.json: unknown quantization: quant_method is {method!r}; "
            f"expected 'fp8' (DeepSeek blocks) or {ct.METHOD!r}"
        )
    block = quantization.get("weight_block_size")
    if block != [FP8_BLOCK, FP8_BLOCK]:
        raise CheckpointError(
            f"config.json: quantization_config.weight_block_size is {block}; expected [128, 128]"
        )
    return None
