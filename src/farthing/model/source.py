"""Sources of model weights: a checkpoint on disk, or tensors in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from farthing.checkpoint.floats import BLOCK, fp8_scales
from farthing.checkpoint.shards import CheckpointError
from farthing.lazy import np
from farthing.model.types import Names
from farthing.ops import Weight, all_finite, as_float32, dtype_name, host
from farthing.ops.arrays import like

if TYPE_CHECKING:
    from torch import Tensor

    from farthing.model.config import ModelConfig
    from farthing.ops import Ops, RouterSpec


class WeightSource(Protocol):
    """The interface the model needs from a checkpoint (see `farthing.checkpoint.Checkpoint`)."""

    def has(self, name: str) -> bool:
        """Whether a tensor of this full name exists."""
        ...

    def holds(self, module: str) -> bool:
        """Whether a routed expert is to be computed here and not on another rank."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A plain parameter; raises if it is missing or of another shape."""
        ...

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """The matrix of a linear module, in whatever format it is stored."""
        ...


@dataclass(frozen=True)
class LayerSource:
    """What one layer of a model is built from."""

    config: ModelConfig
    ops: Ops
    weights: WeightSource
    layer: int
    router: RouterSpec | None = None  # None: a dense layer
    rope: Any = None  # a tensor of `Rotations`; None: nothing that is built reads positions

    @property
    def prefix(self) -> str:
        """Of the names of its tensors."""
        return f"model.layers.{self.layer}."


class MemorySource:
    """Plain tensors by name, as in a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def has(self, name: str) -> bool:
        """Whether a tensor of this full name exists."""
        return name in self._tensors

    def holds(self, module: str) -> bool:
        """Always true: every expert is local."""
        return True

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A parameter; raises KeyError or ValueError."""
        value = self._tensors[name]
        if shape is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
        return value

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """A dense matrix; an expert's with its bias, if it has one."""
        bias = self._tensors.get(f"{module}.bias") if ".experts." in module else None
        return Weight("dense", self.tensor(f"{module}.weight", shape), bias=bias)


class RenamedSource:
    """Maps V3's tensor names to a model type's own names in another source."""

    def __init__(self, source: WeightSource, names: Names) -> None:
        self._source, self._stored = source, names.stored

    def has(self, name: str) -> bool:
        """Whether a tensor of this full name exists."""
        return self._source.has(self._stored(name))

    def holds(self, module: str) -> bool:
        """Whether a routed expert is to be computed here and not on another rank."""
        return self._source.holds(self._stored(module))

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A plain parameter, checked as the source checks it."""
        return self._source.tensor(self._stored(name), shape)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """The matrix of a linear module, in whatever format it is stored."""
        return self._source.weight(self._stored(module), shape)


_EXPERT = re.compile(
    r"(?P<stack>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj(?:\.(?P<kind>weight|bias))?"
)


def stack_of(name: str) -> str:
    """The tensor of all of a layer's experts that holds one expert's matrix or bias, where they are stacked;
    another name unchanged."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return name
    part = "down" if found["part"] == "down" else "gate_up"
    return f"{found['stack']}.{part}_proj{'_bias' if found['kind'] == 'bias' else ''}"


class StackedExperts:
    """Reads single experts from a source that stores a layer's experts as two stacks,
    `load.gate_up_proj` [E, 2 I, D] and `load.down_proj` [E, D, I].

    FP8 stacks have factors `*_proj_scale_inv`, one per expert or per 128 x 128 block of each expert.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def has(self, name: str) -> bool:
        """Whether a tensor of this full name exists."""
        return self._source.has(name)

    def holds(self, module: str) -> bool:
        """Whether a routed expert is to be computed here and not on another rank."""
        return self._source.holds(module)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A plain parameter, checked as the source checks it."""
        return self._source.tensor(name, shape)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """The matrix of a linear module; raises ValueError if a stack's slice has another shape."""
        match = _EXPERT.fullmatch(module)
        if match is None or self._source.has(f"{module}.weight"):  # as some MTP layers have them
            return self._source.weight(module, shape)
        part, expert = match["part"], int(match["index"])
        name = stack_of(module)
        self._only_plain(name)
        whole = self._source.tensor(name)[expert]
        matrix = whole if part == "down" else _half(whole, part)
        if shape is not None and tuple(matrix.shape) != shape:
            raise ValueError(f"{module} has shape {tuple(matrix.shape)}; expected {shape}")
        if dtype_name(matrix.dtype) != "float8_e4m3fn":
            return Weight("dense", matrix)
        return Weight("fp8", matrix, self._factors(f"{name}_scale_inv", expert, whole, part))

    def _only_plain(self, name: str) -> None:
        """Raise CheckpointError for a stack whose experts were quantized together."""
        if self._source.has(f"{name}_weight_scale"):
            raise CheckpointError(
                f"{name} is one quantized tensor of all experts, as ModelOpt writes it, which is not read; "
                "expected single experts, which llm-compressor writes, or a stack of floats"
            )

    def _factors(self, name: str, expert: int, whole: Tensor, part: str) -> Tensor:
        stack = self._source.tensor(name)
        if prod(stack.shape) > 1 and expert >= len(stack):
            raise CheckpointError(f"{name} has factors of {len(stack)} experts; expected more than {expert}")
        scale = stack[expert] if prod(stack.shape) > 1 else stack
        if not all_finite(scale):
            raise CheckpointError(f"{name}: expected finite scales, found NaN or infinity")
        n, k = whole.shape
        if part == "down":
            return fp8_scales(name, scale, (n, k))
        if prod(scale.shape) == 1:
            return fp8_scales(name, scale, (n // 2, k))
        factors = fp8_scales(name, scale, (n, k))
        if n % (2 * BLOCK) and len(factors) < n:
            raise CheckpointError(
                f"{name}: found factors of blocks, but gate and up projection have {n // 2} rows, not whole "
                f"blocks of {BLOCK}; expected one number per expert"
            )
        return _half(factors, part)


def _half(stacked: Tensor, part: str) -> Tensor:
    """The rows of gate or up, which are stored one after the other."""
    half = len(stacked) // 2
    return stacked[half:] if part == "up" else stacked[:half]


_TWICE = 128  # for a bias of 127 of the exponents: the format's codes are twice the values


class InterleavedExperts(StackedExperts):
    """Reads single experts of gpt-oss: a layer's experts are stacks whose rows of gate and up alternate, with
    `*_proj_bias` [E, N]. Matrices are transposed, [E, K, N], or MXFP4: `*_proj_blocks` uint8
    [E, N, K / 32, 16] with two values in a byte, the first in its low half, and `*_proj_scales` uint8
    [E, N, K / 32], powers of two."""

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """As in `StackedExperts`, with the matrix's bias."""
        named = _EXPERT.fullmatch(module)
        if named is None:
            return self._source.weight(module, shape)
        part, expert = named["part"], int(named["index"])
        name = stack_of(module)
        rows = slice(None) if part == "down" else slice(int(part == "up"), None, 2)
        if self._source.has(f"{name}_blocks"):
            blocks, scales = (self._source.tensor(f"{name}_{n}")[expert, rows] for n in ("blocks", "scales"))
            if bool((scales == 255).any()):  # NaN in E8M0
                raise CheckpointError(f"{name}_scales: expected finite scales, found NaN")
            factors = like(np.ldexp(np.float32(1), host(scales).astype(np.int32) - _TWICE), scales)
            found = Weight("mxfp4", blocks.reshape(len(blocks), -1), factors)
        else:
            self._only_plain(name)
            found = Weight("dense", self._source.tensor(name)[expert].T[rows])
        if shape is not None and found.shape != shape:
            raise ValueError(f"{module} has shape {found.shape}; expected {shape}")
        return replace(found, bias=as_float32(self._source.tensor(f"{name}_bias")[expert, rows]))
