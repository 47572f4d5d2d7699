"""The reference backend with a hook on every matrix's input.

The model is the served one (`farthing.model`); only its ops are traced.
Legend: T tokens; D hidden size; I intermediate size; E experts; N, K rows and columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops import AttentionSpec, Batch, LatentCache, MoEWeights, RouterSpec, Weight
from farthing.ops.reference import ReferenceOps

Gated = tuple[Weight, Weight, Weight]
STACKED = (
    "qkv_a"  # q_a_proj (or q_proj) and kv_a_proj_with_mqa, or k_proj and v_proj, which share their input
)


def input_name(module: str) -> str:
    """The name under which a module's input is reported; modules that share an input share a name."""
    parent, _, leaf = module.rpartition(".")
    if leaf in ("q_a_proj", "q_proj", "k_proj", "v_proj", STACKED):
        return f"{parent}.kv_a_proj_with_mqa"
    return f"{parent}.gate_proj" if leaf == "up_proj" else module


@dataclass(slots=True)
class Matrix:
    """A weight [N, K] and the name of its input."""

    name: str
    weight: Tensor
    format: str  # as stored


class TracedOps(ReferenceOps):
    """float32. Subclasses override `before` (may replace the input) and `after_expert`."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.name = "reference float32, traced"

    def before(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Called with the input [T, K] of `matrix`; the returned tensor replaces it."""
        return x

    def after_expert(self, prefix: str, expert: int, gates: Tensor, out: Tensor) -> None:
        """Called with one expert's gates [t] and outputs [t, D] for the t tokens routed to it."""

    # -- packing

    def _matrix(self, name: str, *weights: Weight) -> Matrix:
        quantized = next((w.format for w in weights if w.format != "dense"), "dense")
        values = [w.dequantize() for w in weights]
        return Matrix(input_name(name), values[0] if len(values) == 1 else torch.cat(values), quantized)

    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]]) -> Any:
        return self._matrix(name, *weights())

    def pack_mlp(self, name: str, weights: Callable[[], Gated]) -> Any:
        gate, up, down = weights()
        parts = (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        return tuple(self._matrix(f"{name}.{part}", w) for part, w in parts)

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Any:
        w = weights()
        packed = super().pack_moe(name, spec, lambda: MoEWeights(w.gate, w.bias, (), None))
        experts = [self.pack_mlp(f"{name}.experts.{e}", load) for e, load in enumerate(w.experts) if load]
        shared = self.pack_mlp(f"{name}.shared_experts", w.shared) if w.shared else None
        return name, packed, experts, shared

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Any:
        kv_b, norm = weights()
        packed = super().pack_attention(name, spec, lambda: (Weight("dense", kv_b.dequantize()), norm), rope)
        return self._matrix(name, kv_b), packed

    # -- computing

    def _apply(self, matrix: Matrix, x: Tensor) -> Tensor:
        return F.linear(self.before(matrix, x), matrix.weight)

    def _gated(self, x: Tensor, mlp: tuple[Matrix, Matrix, Matrix]) -> Tensor:
        gate, up, down = mlp
        x = self.before(gate, x)
        return self._apply(down, F.silu(F.linear(x, gate.weight)) * F.linear(x, up.weight))

    def linear(
        self,
        x: Tensor,
        weight: Any,
        norm: Tensor | None = None,
        eps: float = 1e-6,
        residual: Tensor | None = None,
    ) -> Tensor:
        y = self._apply(weight, x if norm is None else self.rms_norm(x, norm, eps))
        return y if residual is None else residual + y

    def mla(
        self,
        q: Tensor,
        kv: Tensor,
        attention: Any,
        cache: LatentCache,
        layer: int,
        batch: Batch,
        eps: float,
        select: Tensor | None = None,
    ) -> Tensor:
        matrix, packed = attention
        # kv_b is absorbed into the query, so its input (the normed latent) is reported but not replaced.
        self.before(matrix, self.rms_norm(kv[:, : packed.spec.latent_dim], packed.norm, eps))
        return super().mla(q, kv, packed, cache, layer, batch, eps, select)

    def mlp(self, x: Tensor, weights: Any, norm: Tensor, eps: float, residual: bool = True) -> Tensor:
        out = self._gated(self.rms_norm(x, norm, eps), weights)
        return x + out if residual else out

    def moe(
        self,
        x: Tensor,
        weights: Any,
        norm: Tensor,
        eps: float,
        counts: Tensor | None = None,
        residual: bool = True,
    ) -> Tensor:
        name, router, experts, shared = weights
        n = self.rms_norm(x, norm, eps)
        ids, gates = self.route(n, router)
        out = torch.zeros_like(n)
        for e, expert in enumerate(experts):
            token, slot = torch.where(ids == e)
            if counts is not None:
                counts[e] += token.numel()
            if token.numel():
                y = self._gated(n[token], expert)
                self.after_expert(name, e, gates[token, slot], y)
                out.index_add_(0, token, y * gates[token, slot, None])
        if shared is not None:
            out += self._gated(n, shared)
        return x + out if residual else out

    def logits(self, x: Tensor, head: Any, norm: Tensor, eps: float) -> Tensor:
        return self.linear(x, head, norm, eps)
