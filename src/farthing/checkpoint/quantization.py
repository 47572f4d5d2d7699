"""How a config.json or a params.json says that weights are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.error import CheckpointError
from farthing.ops.weights import FP8_BLOCK

_KEYS = ("quantization_config", "compression_config")
_MISTRAL, _WEIGHT = "quantization", "qformat_weight"  # in params.json


def quantization_in(config: Mapping[str, Any]) -> Any:
    """The quantization that a configuration or its text part declares, unchecked; None if there is none."""
    text = config.get("text_config")  # multimodal models nest the language model's config
    parts = (config, text if isinstance(text, dict) else {})
    found = next((part[key] for part in parts for key in _KEYS if part.get(key)), None)
    return found or config.get(_MISTRAL) or None


def method_of(quantization: Mapping[str, Any]) -> str:
    """Its quant_method; 'dense' for an empty one."""
    return str(quantization.get("quant_method", "fp8" if _WEIGHT in quantization else "dense"))


def read_quantization(quantization: Any) -> ct.Groups | None:
    """The schemes of compressed-tensors; None for FP8 with its factors; CheckpointError for others."""
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"config.json: quantization_config: got {type(quantization).__name__}; expected an object"
        )
    if _WEIGHT in quantization:
        if quantization[_WEIGHT] != "fp8_e4m3":
            raise CheckpointError(
                f"params.json: {_MISTRAL}.{_WEIGHT}: got {str(quantization[_WEIGHT])[:80]!r}; "
                "expected 'fp8_e4m3'"
            )
        return None
    method = quantization.get("quant_method")
    if method == ct.METHOD:
        return ct.Groups.from_json(quantization)
    if method != "fp8":
        raise CheckpointError(
            f"config.json: quantization_config.quant_method: got {method!r}; expected 'fp8' or {ct.METHOD!r}"
        )
    block = quantization.get("weight_block_size")
    if block is not None and block != [FP8_BLOCK, FP8_BLOCK]:
        raise CheckpointError(
            f"config.json: quantization_config.weight_block_size: got {block}; expected [128, 128], "
            "or null for one factor per matrix"
        )
    return None
