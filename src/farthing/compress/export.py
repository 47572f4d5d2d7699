"""How a compressed model is stored: the export formats, and the tensors of a module in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.compressed_tensors import EXPERTS, GroupKey
from farthing.compress.layer import group_columns
from farthing.compress.recipe import Recipe
from farthing.compress.transform import GROUPED, group_for, stored_format, wanted_group
from farthing.model import AdaptiveExperts, ModelConfig, Parameters
from farthing.ops.weights import FP8_BLOCK, Format, Weight


def encode_deepseek(module: str, weight: Weight) -> dict[str, Tensor]:
    """The tensors of one module. Raises ValueError if it is neither dense nor FP8.

    The format in which DeepSeek released V3 and R1: FP8 blocks with `weight_scale_inv`.
    """
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


def for_export(export: str, recipe: Recipe) -> Recipe:
    """The recipe with what other programs read exactly, for files that are meant for them."""
    if export == "llm-compressor" and recipe.values == "fitted":
        return replace(recipe, values="even")
    return recipe


EXPORTS = ("auto", "compressed-tensors", "llm-compressor", "deepseek-fp8")
STACKS_ONLY = ("gpt_oss", "granitemoe")  # types of whose experts transformers 5.24 reads only stacks
RENAMED = "deepseek_v4"  # a type whose modules transformers 5.24 names otherwise than its files
Keys = Mapping[str, GroupKey | None]


def choose_export(wanted: str, recipe: Recipe, checkpoint: Checkpoint, config: ModelConfig) -> str:
    """`wanted`, or for "auto" the most widely loadable format. Raises ValueError if it cannot store what the
    recipe produces.

    | export | INT8 experts | FP8 | for |
    |---|---|---|---|
    | compressed-tensors | packed in 32-bit words | blocks | Farthing, transformers 5.24 |
    | llm-compressor | plain int8, as llm-compressor writes them | blocks | Farthing, vLLM |
    | deepseek-fp8 | - | blocks with weight_scale_inv | Farthing, transformers 5.24, vLLM, SGLang |

    compressed-tensors stores fitted values of 4 bits, which other programs read as evenly spaced ones;
    llm-compressor stores values that were rounded to even steps.

    transformers 5.24 fuses the routed experts of a layer into one tensor and decompresses them while loading.
    It requires one scheme for all experts of the model, packed and symmetric; FP8 blocks only in DeepSeek's
    format. It computes as many experts for every token as the model names, whatever an adaptive rule says.
    """
    if wanted not in EXPORTS:
        raise ValueError(f"format: got {wanted!r}; expected one of {', '.join(EXPORTS)}")
    if wanted == "auto":
        blocks = recipe.scheme == "fp8" or (recipe.scheme == "keep" and _is_deepseek_fp8(checkpoint))
        has_experts = any(map(config.is_moe, range(config.num_hidden_layers)))
        return "deepseek-fp8" if blocks and has_experts else "compressed-tensors"
    if wanted == "deepseek-fp8" and recipe.scheme not in ("fp8", "keep"):
        raise ValueError(
            f"format 'deepseek-fp8' stores only FP8 blocks, and the scheme of recipe {recipe.name} is "
            f"{recipe.scheme!r}; expected 'fp8' or 'keep', or format 'compressed-tensors'"
        )
    return wanted


def _is_deepseek_fp8(checkpoint: Checkpoint) -> bool:
    return (checkpoint.config.get("quantization_config") or {}).get("quant_method") == "fp8"


def key_in(export: str, module: str, key: GroupKey | None) -> GroupKey | None:
    """The config group of a module as `export` stores it."""
    if key is not None and key.format == "int8" and export != "deepseek-fp8":
        experts = EXPERTS in module and export == "compressed-tensors"
        return replace(key, packed=experts or key.activations is None)
    return key


def encode(export: str, module: str, weight: Weight, key: GroupKey | None) -> dict[str, Tensor]:
    """The tensors of one module, by full name. Raises ValueError for an invalid scale."""
    if export == "deepseek-fp8":
        return encode_deepseek(module, weight)
    return ct.encode(module, weight, packed=key is not None and key.packed)


def quantization_config(export: str, keys: Keys) -> dict[str, Any] | None:
    """`quantization_config` of config.json, None if nothing is quantized."""
    if export != "deepseek-fp8":
        return ct.quantization_config(keys)
    if not any(keys.values()):
        return None
    dense = sorted(name for name, key in keys.items() if key is None)
    return fp8_config() | {"modules_to_not_convert": dense}


def transformers_limits(export: str, checkpoint: Checkpoint, keys: Keys) -> list[str]:
    """Why transformers 5.24 does not load the result or computes something else, one phrase each; empty if
    it does neither.

    checkpoint: the result, or the source before the result exists, which has the same shapes.
    """
    limits = []
    if checkpoint.config.get("layer_sizes"):
        limits.append("layers differ in size (layer_sizes)")
    rule = AdaptiveExperts.from_json(checkpoint.config)
    if rule is not None and rule.leaves_out:
        limits.append("it computes all experts of every token, which the adaptive rule does not")
    blocks = [name for name, key in keys.items() if key is not None and key.format == "fp8"]
    if ragged := [name for name in blocks if _is_ragged(checkpoint.shape(f"{name}.weight"))]:
        limits.append(f"FP8 blocks of 128 do not tile {ragged[0]}; without a GPU it assumes other blocks")
    if any(key is not None and key.format == "nl4" for key in keys.values()):
        limits.append("4-bit values are fitted, and it reads evenly spaced ones; use values: even")
    experts = {key for name, key in keys.items() if EXPERTS in name}
    if experts and checkpoint.config.get("model_type") in STACKS_ONLY:
        limits.append("routed experts are stored one by one; of this type it reads stacks alone")
    if checkpoint.config.get("model_type") == RENAMED and any(keys.values()):
        limits.append("matrices are quantized under names that it translates of plain ones alone")
    if len(experts) > 1:
        named = sorted({_name(key) for key in experts})
        limits.append(f"routed experts are stored as {' and '.join(named)}; it requires one scheme for all")
    for key in experts:
        if key is None or export == "deepseek-fp8":
            continue
        if key.format == "fp8":
            limits.append("routed experts are FP8 blocks in compressed-tensors; use --format deepseek-fp8")
        if key.group_size and not key.symmetric:
            limits.append("routed experts have zero points (symmetric: false)")
        if key.format == "int8" and not key.packed:
            limits.append("routed experts are plain INT8; use --format compressed-tensors")
    return sorted(set(limits))


def _is_ragged(shape: tuple[int, ...]) -> bool:
    """Whether blocks of 128 leave a remainder in a side with several blocks: transformers divides the side by
    its number of scales to get the block size."""
    return any(side > FP8_BLOCK and side % FP8_BLOCK for side in shape)


def _name(key: GroupKey | None) -> str:
    if key is None:
        return "dense"
    return f"{key.format} in groups of {key.group_size}" if key.group_size else key.format


def expected_limits(export: str, checkpoint: Checkpoint, config: ModelConfig, recipe: Recipe) -> list[str]:
    """`transformers_limits` before compressing. An automatic plan is known only after it is made."""
    keys = {
        module: key_in(export, module, _expected_key(checkpoint, config, module, recipe))
        for module in _matrices(checkpoint, config)
    }
    limits = transformers_limits(export, checkpoint, keys)
    if recipe.adaptive:
        limits.append("it computes all experts of every token, which the calibrated rule may not")
    if recipe.scheme == "auto" and any(EXPERTS in module for module in keys):
        limits.append("the plan may store routed experts in different formats (see the report)")
    return limits


class Stored(Protocol):
    """What is known of a checkpoint without reading its tensors."""

    def names(self) -> Iterable[str]: ...

    def has(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def nbytes(self, name: str) -> int: ...

    def stored_as(self, module: str) -> tuple[Format, tuple[int, int]]: ...


def expected_bytes(export: str, checkpoint: Stored, config: ModelConfig, recipe: Recipe) -> int | None:
    """An estimate of the result's weight bytes before any work is done; None where a plan or pruning decides
    what is stored."""
    if recipe.resizes:
        return None
    matrices = _matrices(checkpoint, config)
    parts = {f"{module}.{part}" for module in matrices for part in _PARTS}
    total = sum(checkpoint.nbytes(name) for name in checkpoint.names() if name not in parts)
    for module in matrices:
        stored, (rows, columns) = checkpoint.stored_as(module)
        key = key_in(export, module, _expected_key(checkpoint, config, module, recipe))
        kind = "dense" if key is None else key.format
        if kind == stored:
            names = (f"{module}.{part}" for part in _PARTS)
            total += sum(checkpoint.nbytes(name) for name in names if checkpoint.has(name))
        else:
            scales = columns / FP8_BLOCK**2 if kind == "fp8" else 1.0
            if key is not None and key.group_size:
                scales = columns / key.group_size
            bytes_ = _WEIGHT_BYTES[kind] * columns + _SCALE_BYTES[kind] * scales
            total += round(rows * bytes_)
    return total


_PARTS = ("weight", "weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point")
_WEIGHT_BYTES = {"dense": 2.0, "int8": 1.0, "fp8": 1.0, "q5_0": 0.625, "int4": 0.5, "nl4": 0.5}
_SCALE_BYTES = {"dense": 0, "int8": 4, "fp8": 4, "q5_0": 2, "int4": 2, "nl4": 2}


def _matrices(checkpoint: Stored, config: ModelConfig) -> list[str]:
    """Every matrix whose format a recipe may change."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in checkpoint.names())
    return list(filter(Parameters(config).rounds, modules))


def _expected_key(checkpoint: Stored, config: ModelConfig, module: str, recipe: Recipe) -> GroupKey | None:
    stored, (_, columns) = checkpoint.stored_as(module)
    scheme = "int8" if recipe.scheme == "auto" else recipe.scheme
    columns = group_columns(config, module, columns)
    kind = stored_format(module, scheme, recipe, stored, columns)
    activations = recipe.activations if recipe.activations != "none" else None
    if kind.startswith(GROUPED):
        group = group_for(columns, wanted_group(kind, recipe)) or 0
        if kind.startswith("int5"):
            return GroupKey("q5_0", group)
        if recipe.values == "fitted":
            return GroupKey("nl4", group, recipe.symmetric)
        return GroupKey("int4", group, recipe.symmetric, activations)
    if kind == "int8":
        return GroupKey(kind, activations=activations)
    return GroupKey(kind) if kind == "fp8" else None
