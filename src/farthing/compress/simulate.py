"""Reference arithmetic with the activation rounding of a compressed-tensors checkpoint.

A backend with 8-bit kernels rounds activations itself. This reproduces the loss on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.checkpoint import compressed_tensors as ct
from farthing.compress.trace import Matrix, TracedOps

Rounding = Callable[[Tensor], Tensor]
FP8_MAX = 448.0


def round_token(x: Tensor) -> Tensor:
    """Quantize to symmetric int8 with one scale per row, and dequantize."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round().clamp_(-127, 127).mul_(scale)


def round_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize to symmetric int8 with a given scale, clipping, and dequantize."""
    return (x / scale).round().clamp_(-128, 127).mul_(scale)


def round_fp8_group(x: Tensor, group: int = 128) -> Tensor:
    """Round to e4m3 with one scale per row and `group` columns (DeepSeek-V3 section 3.3)."""
    k = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -k % group)).unflatten(-1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / FP8_MAX
    rounded: Tensor = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)[..., :k]


@dataclass(frozen=True, slots=True)
class Activations:
    """Activation rounding of each module's input."""

    checkpoint: Checkpoint
    groups: ct.Groups | None
    kinds: tuple[str | None, ...]  # of each config group: token | tensor | fp8 | None
    fp8_everywhere: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Activations:
        """Read quantization_config."""
        raw: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
        if raw.get("quant_method") != ct.METHOD:
            return cls(checkpoint, None, (), raw.get("quant_method") == "fp8")
        kinds: list[str | None] = []
        for group in raw["config_groups"].values():
            inputs = group.get("input_activations")
            kinds.append(None if not inputs else "fp8" if inputs["type"] == "float" else inputs["strategy"])
        return cls(checkpoint, ct.Groups.from_json(raw), tuple(kinds), False)

    def rounding(self, module: str) -> Rounding | None:
        """The rounding of a quantized module's input, None to keep it."""
        if self.fp8_everywhere:
            return round_fp8_group
        index = self.groups.index(module) if self.groups else None
        kind = None if index is None else self.kinds[index]
        if kind == "fp8":
            return round_fp8_group
        if kind == "token":
            return round_token
        if kind == "group":
            weight = self.checkpoint.weight(module)
            inputs, group = weight.inputs, weight.group_size
            return None if inputs is None else partial(inputs, group=group)
        if kind == "tensor":
            inputs = self.checkpoint.weight(module).inputs
            return None if inputs is None else partial(inputs, group=0)  # one scale, whatever the groups
        return None


class SimulatedOps(TracedOps):
    """float32 on the CPU, with rounded inputs of quantized matrices."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name = "reference float32, simulated activations"
        self._activations = Activations.of(Checkpoint.open(path))
        self._rounding: dict[str, Rounding | None] = {}

    def before(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Round the input as the checkpoint's scheme for this matrix says."""
        if matrix.format == "dense":
            return x
        if matrix.name not in self._rounding:
            self._rounding[matrix.name] = self._activations.rounding(matrix.name)
        rounding = self._rounding[matrix.name]
        return x if rounding is None else rounding(x)
