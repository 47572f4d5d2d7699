"""Statistics of matrices' inputs, recorded while the model runs, and their rounding simulated anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.checkpoint import compressed_tensors as ct
from farthing.compress import native
from farthing.compress.layer import Matrix, TracedOps
from farthing.compress.source import PlainCheckpoint
from farthing.model import ModelConfig, Parameters

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
    """Activation rounding of each module's input.

    A backend with 8-bit kernels rounds activations itself. This reproduces the loss on any machine.
    """

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
        index = self.groups.index(self.checkpoint.stored(module)) if self.groups else None
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
        checkpoint = PlainCheckpoint.open(path)
        self._activations = Activations.of(checkpoint)
        self._parameters = Parameters(ModelConfig.from_json(checkpoint.config))
        self._rounding: dict[str, Rounding | None] = {}

    def before(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Round the input as the checkpoint's scheme for this matrix says."""
        if matrix.format == "dense":
            return x
        if matrix.name not in self._rounding:
            module = self._parameters.reader(matrix.name).module
            self._rounding[matrix.name] = self._activations.rounding(module)
        rounding = self._rounding[matrix.name]
        return x if rounding is None else rounding(x)


# Collect statistics of every matrix's input while the model runs.
#
# Legend: t tokens that reach a matrix; K columns of the matrix; D hidden size; E experts.


@dataclass(slots=True)
class InputStats:
    """Statistics of one matrix's input. Sums are over tokens."""

    tokens: int = 0
    energy: Tensor = field(default_factory=lambda: torch.zeros(0))  # [K] sum of x^2
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(0))  # [K] sum of |x|
    absmax: Tensor = field(default_factory=lambda: torch.zeros(0))  # [K]
    moments: Tensor | None = None  # [K, K] sum of x x^T …
    halved: bool = False  # … in the lower half alone
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # [<= kept, K] a sample of inputs
    fallback: str | None = None  # the source of these statistics, if this input was too rare

    @property
    def gram(self) -> Tensor | None:
        """Second moments, [K, K]."""
        if self.moments is not None and self.halved:
            for start in range(0, len(self.moments), _STRIP):
                own = self.moments[start : start + _STRIP]
                self.moments[:start, start : start + _STRIP] = own[:, :start].t()
                square = own[:, start : start + _STRIP]
                square.copy_(square.tril() + square.tril(-1).t())
            self.halved = False
        return self.moments

    def add_moments(self, x: Tensor) -> None:
        """Add those of inputs [t, K]."""
        assert self.moments is not None
        if native.runs(x):
            native.add_moments(x, self.moments)
            self.halved = True
        else:
            self.moments += x.t() @ x

    def mean_energy(self) -> Tensor:
        """E[x^2] per column, [K]."""
        return self.energy / max(self.tokens, 1)


_STRIP = 1024  # columns that are mirrored at a time


@dataclass(frozen=True, slots=True)
class Wanted:
    """Statistics to collect."""

    gram: bool = False
    rows: int = 128


class Recorder(TracedOps):
    """TracedOps that record inputs by name (see `Layer.reads`).

    Legend: t tokens that reach a matrix; K columns of the matrix; D hidden size; E experts.
    """

    def __init__(self, wanted: Wanted, seed: int = 0) -> None:
        super().__init__()
        self.wanted = wanted
        self.inputs: dict[str, InputStats] = {}
        self.experts: dict[str, Tensor] = {}  # of MoE layers: tokens of each expert, [E] int64
        self._generator = torch.Generator().manual_seed(seed)

    def before(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Record x and return it."""
        stats = self.inputs.setdefault(matrix.name, InputStats())
        x32 = x.float()
        if not stats.tokens:
            stats.energy, stats.magnitude = torch.zeros(x.shape[1]), torch.zeros(x.shape[1])
            stats.absmax = torch.zeros(x.shape[1])
            stats.rows = torch.zeros(0, x.shape[1])
            stats.moments = torch.zeros(x.shape[1], x.shape[1]) if self.wanted.gram else None
        absolute = x32.abs()
        if not bool(absolute.max().isfinite()):
            raise ValueError(f"{matrix.name}: the input is NaN or infinite; the model cannot be calibrated")
        stats.energy += x32.square().sum(0)
        stats.magnitude += absolute.sum(0)
        stats.absmax = torch.maximum(stats.absmax, absolute.amax(0))
        if stats.moments is not None:
            stats.add_moments(x32)
        self._sample(stats, x32)
        stats.tokens += len(x)
        return x

    def _sample(self, stats: InputStats, x: Tensor) -> None:
        """Keep a uniform sample of rows over all batches."""
        kept = self.wanted.rows
        share = min(1.0, kept / (stats.tokens + len(x)))
        new = x[torch.rand(len(x), generator=self._generator) < share] if len(x) > kept else x
        rows = torch.cat((stats.rows, new))
        if len(rows) > kept:
            rows = rows[torch.randperm(len(rows), generator=self._generator)[:kept]]
        stats.rows = rows.clone()

    def after_expert(self, prefix: str, expert: int, gates: Tensor, out: Tensor) -> None:
        """Count the expert's tokens."""
        tokens = self.experts.get(prefix, torch.zeros(0, dtype=torch.int64))
        tokens = torch.nn.functional.pad(tokens, (0, max(0, expert + 1 - len(tokens))))
        tokens[expert] += len(gates)
        self.experts[prefix] = tokens


def with_fallbacks(
    inputs: Mapping[str, InputStats], names: list[str], least: int
) -> tuple[dict[str, InputStats], list[str]]:
    """Statistics for every name in `names` (experts of one layer, one kind of input).

    Inputs with fewer than `least` tokens use their peers' statistics: the mean of all experts for second
    moments, the maximum for ranges. Returns the names that needed it.
    """
    seen = [inputs[n] for n in names if n in inputs and inputs[n].tokens]
    rare = [n for n in names if n not in inputs or inputs[n].tokens < least]
    if not rare or not seen:
        return {n: inputs[n] for n in names if n in inputs}, rare
    grams = [s.gram for s in seen if s.gram is not None]
    pooled = InputStats(
        tokens=sum(s.tokens for s in seen),
        energy=torch.stack([s.energy for s in seen]).sum(0),
        magnitude=torch.stack([s.magnitude for s in seen]).sum(0),
        absmax=torch.stack([s.absmax for s in seen]).amax(0),
        moments=reduce(add, grams) if grams else None,
        rows=torch.cat([s.rows for s in seen])[:: max(1, len(seen))],
        fallback="mean of all experts, range of the widest",
    )
    return {n: pooled if n in rare else inputs[n] for n in names}, rare
