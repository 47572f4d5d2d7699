"""Matrices of bitsandbytes and of NVIDIA's ModelOpt.

Legend: N rows, K columns. A factor multiplies, whatever its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.floats import Fp4, Fp8
from farthing.checkpoint.layout import Layout, Parts, Scheme, expect, field, integers, strings
from farthing.checkpoint.shards import CheckpointError
from farthing.checkpoint.words import Named
from farthing.lazy import torch
from farthing.ops import Format, Weight

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
_WHERE = "config.json: quantization_config"


@cache
def _say_dense(what: str) -> None:
    log.warning("%s: held in 16 bits, because no kernel reads it; --quantization rounds it to fewer", what)


# bitsandbytes.

_STATES = ("nf4", "fp4")
_FLOATS = ("bfloat16", "float16", "float32")
_SCB = 7.874015718698502e-3  # of a row's largest magnitude, which is 127


@dataclass(frozen=True, slots=True)
class FourBits:
    """One of 16 values for each of 64 adjacent numbers, the even one high in a byte, and their largest
    magnitude, which may itself be an index into 256 values (double quantization).

    The values are no multiples of one step, so that kernels could not compute with the indices exactly.
    """

    format: Format = "dense"
    group_size: None = None
    symmetric: bool = True

    def shape(self, parts: Parts) -> tuple[int, int]:
        """That of the matrix, which only its state says."""
        n, k = self._state(parts)["shape"]
        return n, k

    def read(self, parts: Parts) -> Weight:
        """The values that bitsandbytes multiplies by, in the model's dtype."""
        state = self._state(parts)
        (n, k), block = state["shape"], state["blocksize"]
        size = parts.tensor("weight.absmax")
        if "nested_offset" in state:
            size = _looked_up(parts.tensor("weight.nested_quant_map", "float32"), size)
            size = _times(size, parts.tensor("weight.nested_absmax", "float32"), state["nested_blocksize"])
            size += state["nested_offset"]
        data = parts.tensor("weight").flatten().view(torch.uint8)
        expect("weight", (-(-n * k // 2),), data)
        expect("weight.absmax", (-(-n * k // block),), size)
        codes = parts.tensor("weight.quant_map", "float32")
        value = _looked_up(codes, torch.stack((data >> 4, data & 15), -1))[: n * k]
        _say_dense(f"4 bits of bitsandbytes ({state['quant_type']})")
        value = _times(value, size.float(), block).view(n, k)
        return Weight("dense", value.to(getattr(torch, state["dtype"])))

    def _state(self, parts: Parts) -> dict[str, Any]:
        suffixes = [f"weight.quant_state.bitsandbytes__{kind}" for kind in _STATES]
        suffix = next(filter(parts.has, suffixes), suffixes[0])
        raw = bytes(parts.tensor(suffix, "uint8").flatten().tolist())
        try:
            state = json.loads(raw)
        except (ValueError, RecursionError):
            raise CheckpointError(f"{suffix}: expected JSON, found {raw[:40]!r}") from None
        if not _is_state(state):
            raise CheckpointError(
                f"{suffix}: got {str(state)[:200]}; expected quant_type, dtype, blocksize and a shape of two "
                "sizes, and nested_blocksize beside nested_offset"
            )
        checked: dict[str, Any] = state
        return checked


def _is_state(state: Any) -> bool:
    if not isinstance(state, dict) or state.get("quant_type") not in _STATES:
        return False
    shape, nested = state.get("shape"), state.get("nested_offset")
    sizes = [state.get("blocksize"), *(shape if isinstance(shape, list) else [])]
    sizes += [state.get("nested_blocksize")] if nested is not None else []
    return (
        len(sizes) == (3 if nested is None else 4)
        and all(type(size) is int and 0 < size < 1 << 31 for size in sizes)
        and (nested is None or isinstance(nested, float))
        and state.get("dtype") in _FLOATS
    )


def _looked_up(values: Tensor, index: Tensor) -> Tensor:
    """One value for each index."""
    found: Tensor = values.flatten().index_select(0, index.flatten().to(torch.int32))
    return found


def _times(value: Tensor, factor: Tensor, block: int) -> Tensor:
    """Numbers times one factor per block of them, of which the last may be cut off."""
    return value.mul_(factor.repeat_interleave(block)[: len(value)])


@dataclass(frozen=True, slots=True)
class EightBits:
    """LLM.int8: rows of integers and their largest magnitude. What it multiplies in 16 bits, columns with
    outliers in the input, has groups with a scale of their own here."""

    format: Format = "int8"
    group_size: None = None
    symmetric: bool = True

    def shape(self, parts: Parts) -> tuple[int, int]:
        """That of the stored matrix."""
        n, k = parts.shape("weight")
        return n, k

    def read(self, parts: Parts) -> Weight:
        """The matrix with the scales of its rows."""
        if parts.has("weight_format") and int(parts.tensor("weight_format")):
            raise CheckpointError(
                "weight_format: got tiles of a GPU; expected rows (0), as bitsandbytes has written since 0.37"
            )
        data, size = parts.matrix("weight", "int8"), parts.tensor("SCB").float()
        expect("SCB", (len(data),), size)
        return Weight("int8", data, (size * _SCB).unsqueeze(1))


def bitsandbytes(raw: Mapping[str, Any]) -> Layout:
    """Of bitsandbytes. `llm_int8_skip_modules` are last parts of names, or names."""
    eight = field(raw, "load_in_8bit", bool, _WHERE)
    skipped = [f".{name}" for name in strings(raw, "llm_int8_skip_modules", _WHERE)]
    kept = (lambda module: any(f".{module}".endswith(name) for name in skipped), None)
    return Named(EightBits() if eight else FourBits(), (kept,))


# ModelOpt.


@dataclass(frozen=True, slots=True)
class RowPairs:
    """Symmetric integers of 4 bits, of which a byte has those of two rows, the even one low."""

    group_size: int
    format: Format = "int4"
    symmetric: bool = True

    def shape(self, parts: Parts) -> tuple[int, int]:
        """That of the matrix."""
        pairs, k = parts.shape("weight")
        return 2 * pairs, k

    def read(self, parts: Parts) -> Weight:
        """The matrix. W4A8's second factor is that of its rounding to FP8, which is not done here."""
        data = parts.matrix("weight", "uint8") ^ 0x88
        parts.skip("weight_scale_2")
        u = torch.stack((data & 15, data >> 4), 1).flatten(0, 1)
        return integers(4, u[:, ::2] | u[:, 1::2] << 4, parts.tensor("weight_scale"), None, self.group_size)


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A matrix whose input may be multiplied by a factor per column (`pre_quant_scale`).

    Those of a gated MLP's `down_proj` go into the scales of `up_proj`, whose rows are these columns. Others
    become part of the matrix, which then is dense.
    """

    base: Scheme

    @property
    def format(self) -> Format:
        """That of the matrix without factors, which most have: of AWQ's, ModelOpt moves them to the norm."""
        return self.base.format

    @property
    def group_size(self) -> int | None:
        """That of the matrix."""
        return self.base.group_size

    @property
    def symmetric(self) -> bool:
        """That of the matrix."""
        return self.base.symmetric

    def shape(self, parts: Parts) -> tuple[int, int]:
        """That of the matrix."""
        return self.base.shape(parts)

    def read(self, parts: Parts) -> Weight:
        """The matrix with its own factors, and those of the one behind it."""
        weight, own = self.base.read(parts), parts.module.rpartition(".")[2]
        behind = parts.beside("down_proj")
        if own == "up_proj" and _goes_before(behind):
            assert weight.scale is not None
            factor = behind.tensor("pre_quant_scale").float()
            weight = replace(weight, scale=weight.scale * factor.unsqueeze(1))
        if not parts.has("pre_quant_scale") or (own == "down_proj" and _goes_before(parts)):
            return weight
        factor = parts.tensor("pre_quant_scale")
        expect("pre_quant_scale", weight.shape[1:], factor)
        _say_dense(f"{own} and its pre_quant_scale (of ModelOpt)")
        return Weight("dense", (weight.dequantize() * factor.float()).bfloat16())


def _goes_before(down: Parts) -> bool:
    """Whether the factors of a down projection's input can be those of the rows of `up_proj`."""
    up = down.beside("up_proj")
    if not (down.has("pre_quant_scale") and up.has("weight_scale")) or down.setting("swiglu_limit"):
        return False  # unless rows have scales of their own and up's output is not clamped
    return up.shape("weight_scale")[:1] == down.shape("pre_quant_scale") and not up.has("bias")


def _int8(group: int, static: bool) -> Scheme:
    return ct.Scheme("int-quantized", 8, True, "channel", None, static_inputs=static)


_MX = ct.Scheme("mxfp8-quantized", 8, True, "group", 32, floating=True)
# quant_algo -> scheme, given group_size or its default.
_ALGORITHMS: Mapping[str, tuple[int, Callable[[int], Scheme]]] = {
    "FP8": (0, lambda group: Fp8()),
    "FP8_PER_CHANNEL_PER_TOKEN": (0, lambda group: Fp8()),
    "FP8_PB_WO": (0, lambda group: Fp8()),
    "MXFP8": (32, lambda group: _MX),
    "MXFP4": (32, partial(Fp4, scale="weight_scale")),
    "W4A8_MXFP4_FP8": (32, partial(Fp4, scale="weight_scale")),
    "NVFP4": (16, partial(Fp4, scale="weight_scale", second="weight_scale_2")),
    "W4A16_NVFP4": (16, partial(Fp4, scale="weight_scale", second="weight_scale_2")),
    "W4A8_NVFP4_FP8": (16, partial(Fp4, scale="weight_scale", second="weight_scale_2")),
    "NVFP4_AWQ": (16, partial(Fp4, scale="weight_scale", second="weight_scale_2")),
    "W4A16_AWQ": (128, RowPairs),
    "W4A8_AWQ": (128, RowPairs),
    "W8A16": (0, partial(_int8, static=False)),
    "W8A8_SQ_PER_CHANNEL": (0, partial(_int8, static=True)),
}
_MIXED = "MIXED_PRECISION"


def _algorithm(raw: Mapping[str, Any], where: str) -> Scheme | None:
    name = field(raw, "quant_algo", str, where)
    if name is None:  # only the cache is quantized
        return None
    if name.upper() not in _ALGORITHMS:
        raise CheckpointError(
            f"{where}.quant_algo: got {name[:80]!r}; expected {_MIXED} or one of {', '.join(_ALGORITHMS)}, "
            "with which ModelOpt quantizes the source again"
        )
    usual, scheme = _ALGORITHMS[name.upper()]
    group = field(raw, "group_size", int, where) or usual
    if usual and (not 1 <= group <= 1 << 16 or (usual in (16, 32) and group != usual)):
        raise CheckpointError(f"{where}.group_size: got {group}; expected {usual}")
    return Smoothed(scheme(group))


def modelopt(raw: Mapping[str, Any]) -> Layout:
    """Of ModelOpt, flat in config.json, or with a part `quantization` in hf_quant_config.json. The modules
    that are not quantized have wildcards."""
    raw = field(raw, "quantization", dict, _WHERE) or raw
    names = (*strings(raw, "ignore", _WHERE), *strings(raw, "exclude_modules", _WHERE))
    if raw.get("quant_algo") != _MIXED:
        return Named(
            _algorithm(raw, _WHERE), ((lambda module: any(fnmatchcase(module, n) for n in names), None),)
        )
    layers = field(raw, "quantized_layers", dict, _WHERE) or {}
    each = {
        name: _algorithm(field(layers, name, dict, f"{_WHERE}.quantized_layers") or {}, f"{_WHERE}.{name}")
        for name in layers
    }
    return Named(None, tuple((name.__eq__, scheme) for name, scheme in each.items()))
