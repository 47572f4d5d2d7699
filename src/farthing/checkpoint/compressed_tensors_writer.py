"""Write the compressed-tensors format (0.20): `Weight` -> tensors, and `quantization_config`.

INT8 routed experts have two forms. llm-compressor writes plain int8 matrices (`int-quantized`), which vLLM
serves as W8A8. transformers 5.24 fuses the experts and decompresses packed ones only, so `packed` writes them
as 8-bit `pack-quantized`. Everything else has one form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.compressed_tensors import METHOD
from farthing.lazy import torch
from farthing.ops.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = "0.20.0"
EXPERTS = ".mlp.experts."  # part of every routed expert's module name
EXPERTS_TARGET = r"re:.*\.mlp\.experts\.\d+\..*"


def _pack_rows(zero: Tensor) -> Tensor:
    """int8 [N, G] -> int32 [ceil(N/8), G]."""
    u = torch.nn.functional.pad((zero.t() + 8).to(torch.uint8), (0, -zero.shape[0] % 8))
    return _words(u[:, 0::2] | (u[:, 1::2] << 4)).t().contiguous()


def _words(data: Tensor) -> Tensor:
    """uint8 [R, 4 W] -> int32 [R, W]. Flat in between: a row stride of 1 cannot be viewed as words."""
    return data.flatten().view(torch.int32).view(data.shape[0], -1)


def encode(module: str, weight: Weight, packed: bool = False) -> dict[str, Tensor]:
    """The tensors of one module, by full name; packed: see the module's docstring.

    Raises ValueError for a scale that is zero or not finite, and for a negative one outside INT4, where the
    sign selects the end of the range that reaches further (AutoRound writes such scales too).
    """
    if weight.format == "dense":
        return {f"{module}.weight": weight.data}
    assert weight.scale is not None
    size = weight.scale.abs() if weight.format == "int4" else weight.scale
    if not bool(((size > 0) & size.isfinite()).all()):
        raise ValueError(f"{module}: a scale is zero, negative or not finite; expected finite scales > 0")
    out = {f"{module}.weight_scale": weight.scale}
    if weight.format == "fp8" or (weight.format == "int8" and not packed):
        return out | {f"{module}.weight": weight.data}
    n, k = weight.shape
    data = weight.data
    if weight.format == "int8":
        data = (data.to(torch.int16) + 128).to(torch.uint8)
    out[f"{module}.weight_packed"] = _words(torch.nn.functional.pad(data, (0, -data.shape[1] % 4)))
    out[f"{module}.weight_shape"] = torch.tensor([n, k], dtype=torch.int64)
    if weight.zero_point is not None:
        out[f"{module}.weight_zero_point"] = _pack_rows(weight.zero_point)
    return out


@dataclass(frozen=True, slots=True)
class GroupKey:
    """The properties that define a config group when writing."""

    format: str  # int8 | int4 | fp8
    group_size: int = 0
    symmetric: bool = True
    # token (dynamic) | tensor (static) | None (kept); int4 also group4: 4 bits, the weights' groups
    activations: str | None = None
    packed: bool = False  # int8 in 32-bit words


def key_of(weight: Weight, activations: str | None = None) -> GroupKey | None:
    """The config group a weight belongs to; None for a dense one."""
    if weight.format == "dense":
        return None
    if weight.format == "int4":
        return GroupKey("int4", weight.group_size, weight.zero_point is None, activations)
    return GroupKey(weight.format, activations=activations if weight.format == "int8" else None)


def quantization_config(modules: Mapping[str, GroupKey | None]) -> dict[str, Any] | None:
    """`quantization_config` for modules (all Linear modules of the model; None = kept dense).

    Routed experts of one group are targeted by one pattern, so that readers that fuse them find their scheme.
    If one other group remains, its target is the class Linear; if several remain, each lists its modules.
    """
    keys = sorted({k for k in modules.values() if k}, key=str)
    if not keys:
        return None
    experts = {k for name, k in modules.items() if EXPERTS in name}
    alike = experts.pop() if len(experts) == 1 else None
    rest = {k for name, k in modules.items() if k and (alike is None or EXPERTS not in name)}
    groups = {}
    for i, key in enumerate(keys):
        targets: Sequence[str] = ["Linear"]
        if len(rest) > 1 or key not in rest:
            own = (name for name, k in modules.items() if k == key)
            targets = sorted(name for name in own if alike is None or EXPERTS not in name)
        if key == alike and len(keys) > 1:
            targets = [EXPERTS_TARGET, *targets]
        groups[f"group_{i}"] = _group(key, targets)
    formats = {g["format"] for g in groups.values()}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted(name for name, k in modules.items() if k is None),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _group(key: GroupKey, targets: Iterable[str]) -> dict[str, Any]:
    if key.format == "fp8":
        storage = "float-quantized"
        weights = _args(8, "float", "block", block_structure=[128, 128])
        inputs: dict[str, Any] | None = _args(8, "float", "group", group_size=128, dynamic=True)
    else:
        inputs = None
        if key.activations == "group4":
            inputs = _args(4, "int", "group", group_size=key.group_size, dynamic=True)
        elif key.activations:
            inputs = _args(8, "int", key.activations, dynamic=key.activations == "token")
        if key.format == "int8":
            storage = "pack-quantized" if key.packed else "int-quantized"
            weights = _args(8, "int", "channel")
        else:
            storage = "pack-quantized"
            weights = _args(4, "int", "group", group_size=key.group_size, symmetric=key.symmetric)
    return {
        "format": storage,
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _args(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    defaults = {
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
    }
    return {"num_bits": bits, "type": kind, "strategy": strategy} | defaults | more
