"""One decoder layer of a checkpoint as named float32 tensors: how to run it and to observe its inputs.

Legend: D hidden size; E experts; T calibration tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.checkpoint.reader import Checkpoint
from farthing.compress.native import short_products
from farthing.memory import return_freed_memory
from farthing.model import (
    DecoderModel,
    LayerSource,
    MemorySource,
    ModelConfig,
    Parameters,
    WeightSource,
    form_of,
)
from farthing.model.attention import RopeTable
from farthing.model.parameters import layer_of, of_layer
from farthing.model.spec import COMPRESSED, GATED
from farthing.ops import (
    SILU,
    AttentionSpec,
    Batch,
    Gate,
    MoEWeights,
    Norm,
    Ops,
    Place,
    RouterSpec,
    Weight,
)
from farthing.ops.reference import ReferenceOps, capped, gated_by, route, shared_weight

Gated = tuple[Weight, Weight, Weight]


@dataclass(slots=True)
class Matrix:
    """A weight [N, K] and the name of its input."""

    name: str
    weight: Tensor
    format: str  # as stored
    bias: Tensor | None = None  # [N], of an expert

    def times(self, x: Tensor) -> Tensor:
        """The product with an input [T, K], float32 [T, N]."""
        y = F.linear(x.to(self.weight.dtype), self.weight).float()
        return y if self.bias is None else y + self.bias


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Products with matrices are those of bfloat16, as serving in it computes them, where the processor
    multiplies that faster. Other float32 products round their factors to it; sums stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_PIECE = re.compile(r"\.\d+$")  # of a matrix that is packed in pieces, whose inputs are counted as one


class TracedOps(ReferenceOps):
    """float32. Subclasses override `before` (may replace the input) and `after_expert`.

    The model is the served one (`farthing.model`); only its ops are traced. Legend: T tokens; D hidden size;
    I intermediate size; E experts; N, K rows and columns of a matrix.
    """

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.name = "reference float32, traced"
        self.first = 0  # the layer that the model at hand numbers 0

    def before(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Called with the input [T, K] of `matrix`; the returned tensor replaces it."""
        return x

    def after_expert(self, prefix: str, expert: int, gates: Tensor, out: Tensor) -> None:
        """Called with one expert's gates [t] and outputs [t, D] for the t tokens routed to it."""

    # -- packing

    def _matrix(self, name: str, *weights: Weight) -> Matrix:
        quantized = next((w.format for w in weights if w.format != "dense"), "dense")
        values = [w.dequantize() for w in weights]
        whole = values[0] if len(values) == 1 else torch.cat(values)
        if short_products():
            whole = whole.bfloat16()
        return Matrix(_PIECE.sub("", numbered(name, self.first)), whole, quantized, weights[0].bias)

    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]], heads: int = 1) -> Any:
        return self._matrix(name, *weights())

    def pack_mlp(self, name: str, weights: Callable[[], Gated], activation: Gate = SILU) -> Any:
        gate, up, down = weights()
        first, _, last = GATED
        inputs = ((first, gate), (first, up), (last, down))
        return activation, *(self._matrix(f"{name}.{module}", w) for module, w in inputs)

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Any:
        w = weights()
        packed = super().pack_moe(name, spec, lambda: replace(w, experts=(), shared=None))
        experts = [
            self.pack_mlp(f"{name}.experts.{e}", load, spec.gate) for e, load in enumerate(w.experts) if load
        ]
        shared = self.pack_mlp(f"{name}.shared_experts", w.shared, spec.gate) if w.shared else None
        return numbered(name, self.first), packed, experts, shared

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Any:
        kv_b, norm = weights()
        packed = super().pack_attention(name, spec, lambda: (Weight("dense", kv_b.dequantize()), norm), rope)
        return self._matrix(name, kv_b), packed

    # -- computing

    def _apply(self, matrix: Matrix, x: Tensor) -> Tensor:
        return matrix.times(self.before(matrix, x))

    def _gated(self, x: Tensor, mlp: tuple[Gate, Matrix, Matrix, Matrix]) -> Tensor:
        activation, gate, up, down = mlp
        x = self.before(gate, x)
        both = (matrix.times(x) for matrix in (gate, up))
        return self._apply(down, gated_by(activation, *both))

    def linear(
        self, x: Tensor, weight: Any, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        y = self._apply(weight, x if norm is None else self.rms_norm(x, norm))
        return y if residual is None else residual + y

    def mla(self, q: Tensor, kv: Tensor, heads: Any, place: Place, select: Tensor | None = None) -> Tensor:
        matrix, packed = heads
        # kv_b is absorbed into the query, so its input (the normed latent) is reported but not replaced.
        norm = Norm(packed.norm, packed.spec.norm_eps)
        self.before(matrix, self.rms_norm(kv[:, : packed.spec.latent_dim], norm))
        return super().mla(q, kv, packed, place, select)

    def mlp(self, x: Tensor, weights: Any, norm: Norm, residual: bool = True) -> Tensor:
        out = self._gated(self.rms_norm(x, norm), weights)
        return x + out if residual else out

    def moe(
        self, x: Tensor, weights: Any, norm: Norm, counts: Tensor | None = None, residual: bool = True,
        chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        n, router = self.rms_norm(x, norm), weights[1]
        if chosen is None:
            routed = self.route(n, router)
        else:
            routed = route(F.linear(n.float(), router.gate), None, router.spec, chosen)
        out = self._mixture(n, weights, *routed, counts)
        return x + out if residual else out

    def _mixture(self, n: Tensor, weights: Any, ids: Tensor, gates: Tensor, counts: Tensor | None) -> Tensor:
        name, router, experts, shared = weights
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
            out += self._gated(n, shared) * shared_weight(n, router.shared_gate)
        return out

    def logits(self, x: Tensor, head: Any, norm: Norm) -> Tensor:
        return capped(self.linear(x, head, norm), norm)


_STREAMS = ("attn_hc", "ffn_hc", "hc_head")  # hyper-connections, which have a scale always
SMALLEST_GROUP = 32  # 4-bit weights that share a scale


@dataclass(slots=True)
class Layer:
    """Parameters of layer `index` by full name, in float32; tables of integers as they are."""

    config: ModelConfig
    index: int
    tensors: dict[str, Tensor]
    stored: dict[str, torch.dtype] = field(default_factory=dict)  # dtype of plain tensors in the source
    formats: dict[str, str] = field(default_factory=dict)  # storage of each matrix in the source
    parameters: Parameters = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.parameters = Parameters(self.config)

    @classmethod
    def read(cls, checkpoint: Checkpoint, config: ModelConfig, index: int) -> Layer:
        """Read and dequantize one layer. Raises CheckpointError, or ValueError for NaN or infinity."""
        return_freed_memory()  # of the layer before
        prefix = f"model.layers.{index}."
        layer = cls(config, index, {})
        names = [n for n in checkpoint.names() if n.startswith(prefix)]
        modules = {n.rpartition(".")[0] for n in names} - {f"{prefix}{each}" for each in _STREAMS}
        quantized = set(filter(checkpoint.is_quantized, modules))
        for module in sorted(quantized):
            weight = checkpoint.weight(module)
            layer.tensors[f"{module}.weight"] = weight.dequantize()
            layer.formats[module] = weight.format
            layer.stored[f"{module}.weight"] = torch.bfloat16  # if it is not to be compressed
        for name in names:
            module = name.rpartition(".")[0]
            if module in quantized and not name.endswith(".bias"):
                continue
            tensor = checkpoint.tensor(name)
            layer.stored[name] = tensor.dtype
            layer.tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in layer.tensors.items():
            check_finite(name, tensor)
        return layer

    @property
    def prefix(self) -> str:
        """`model.layers.{i}.`"""
        return f"model.layers.{self.index}."

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return self.config.is_moe(self.index)

    @property
    def is_mtp(self) -> bool:
        """Whether it is a multi-token-prediction layer."""
        return self.index >= self.config.num_hidden_layers

    @property
    def experts(self) -> int:
        """Current number of routed experts."""
        return self.config.experts_in(self.index)

    def mlps(self) -> list[str]:
        """Every gated MLP that is compressed: the dense one, or routed experts and then the shared one."""
        mlp = f"{self.prefix}mlp"
        if not self.is_moe:
            return [mlp]
        experts = self.config.feed(self.index).experts
        shared = [f"{mlp}.shared_experts"] if experts and experts.shared else []
        return [f"{mlp}.experts.{e}" for e in range(self.experts)] + shared

    def modules(self) -> list[str]:
        """Every linear matrix that may be compressed: attention, MLPs, an MTP layer's; not the router."""
        own = [t for t in of_layer(self.config, self.index) if t.role in COMPRESSED]
        found = [t.module for t in own if t.part == "mixer"]
        found += [f"{mlp}.{name}" for mlp in self.mlps() for name in GATED]
        found += [t.module for t in own if t.part == "layer"]
        return [module for module in found if f"{module}.weight" in self.tensors]

    def reads(self, module: str) -> str:
        """The name under which a module's input is reported; modules that share an input share a name."""
        return self.parameters.reads(module)

    def group_columns(self, module: str) -> int:
        """Columns that the groups of a matrix must divide."""
        return group_columns(self.config, module, self.weight(module).shape[1])

    def weight(self, module: str) -> Tensor:
        """The matrix [N, K]."""
        return self.tensors[f"{module}.weight"]

    def set(self, module: str, value: Tensor) -> None:
        """Replace a matrix."""
        self.tensors[f"{module}.weight"] = value

    def families(self) -> Iterator[list[str]]:
        """Modules with the same shape and kind of input, such as all experts' gates."""
        seen: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for module in self.modules():
            kind = module.rpartition(".")[2] if ".experts." in module else module
            seen.setdefault((kind, tuple(self.weight(module).shape)), []).append(module)
        yield from seen.values()


def group_columns(config: ModelConfig, module: str, columns: int) -> int:
    """The columns that groups of 4-bit weights must divide: of a routed expert those of all three projections
    if any group size does, so that one scheme holds for every expert."""
    experts = config.feed(layer_of(module) or 0).experts if ".mlp.experts." in module else None
    common = math.gcd(config.hidden_size, experts.width) if experts else columns
    return common if common % SMALLEST_GROUP == 0 else columns


def numbered(name: str, first: int) -> str:
    """The name of a layer's tensor or module where the layer numbered 0 here is number `first`."""
    start, found, rest = name.partition("model.layers.")
    if start or not found:
        return name
    layer, dot, rest = rest.partition(".")
    return f"{found}{int(layer) + first}{dot}{rest}"


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError with the tensor's name if it has NaN or infinity."""
    # A finite sum implies finite terms and needs no memory; finite terms may still overflow the sum.
    if not bool(tensor.sum(dtype=torch.float32).isfinite() or tensor.float().isfinite().all()):
        raise ValueError(f"{name} has NaN or infinity; expected finite numbers")


@dataclass(slots=True)
class Stream:
    """Calibration activations between two layers."""

    hidden: Tensor  # [T, D]
    ids: Tensor  # [T]
    next_ids: Tensor  # [T]
    lengths: list[int]
    others: dict[str, Tensor] = field(default_factory=dict)  # by `Recipe.streams`, [T, D] each

    def chunks(self, tokens: int) -> Iterator[tuple[slice, list[int]]]:
        """Whole windows, about `tokens` tokens at a time."""
        start = size = 0
        group: list[int] = []
        for n in self.lengths:
            if group and size + n > tokens:
                yield slice(start, start + size), group
                start, size, group = start + size, 0, []
            group.append(n)
            size += n
        if group:
            yield slice(start, start + size), group


class LayersFrom:
    """A source whose layers are numbered from one of them on."""

    def __init__(self, source: WeightSource, first: int) -> None:
        self._source, self._first = source, first

    def has(self, name: str) -> bool:
        """Whether a tensor of this full name exists."""
        return self._source.has(numbered(name, self._first))

    def holds(self, module: str) -> bool:
        """Whether a routed expert is to be computed here and not on another rank."""
        return self._source.holds(numbered(module, self._first))

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A plain parameter, checked as the source checks it."""
        return self._source.tensor(numbered(name, self._first), shape)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """The matrix of a linear module, in whatever format it is stored."""
        return self._source.weight(numbered(module, self._first), shape)


def layers_of(
    config: ModelConfig, ops: Ops, source: WeightSource, span: range, routers: list[RouterSpec | None]
) -> DecoderModel:
    """Some hidden layers of a model alone, as it has them."""
    part = config.part(span)
    if isinstance(ops, TracedOps):
        ops.first = span.start
    return form_of(config)(part, ops, LayersFrom(source, span.start), routers, False, False)


Block = Callable[[Tensor, Tensor, Batch, int], Tensor]


def build(layer: Layer, ops: TracedOps, embedding: Tensor, final_norm: Tensor, page: int) -> Block:
    """The layer as the serving model has it, on `ops`: (hidden, next_ids, batch, blocks) -> hidden.

    page: tokens of a block.
    """
    c, index = replace(layer.config, num_nextn_predict_layers=0), layer.index
    experts = c.feed(index).experts
    router = experts.router if experts else None
    if not layer.is_mtp:
        model = layers_of(c, ops, MemorySource(layer.tensors), range(index, index + 1), [router])

        def block(h: Tensor, next_ids: Tensor, batch: Batch, blocks: int) -> Tensor:
            return model.run_layers(h, batch, model.new_cache(blocks, page, "float32"))

        return block
    ops.first = 0
    hidden_only = MemorySource({k: v for k, v in layer.tensors.items() if not k.endswith(_COPIES)})
    at = LayerSource(c, ops, hidden_only, index, router, ops.tensor(RopeTable(c, index).whole()))
    form, norm = form_of(c), Norm(final_norm, c.rms_norm_eps)
    mtp = form.draft_layer(at, embedding, None, _no_head)
    mtp.layer = mtp.row = 0  # the cache below has one layer
    alone = replace(layer.config, num_nextn_predict_layers=1).part(range(0))

    def draft(h: Tensor, next_ids: Tensor, batch: Batch, blocks: int) -> Tensor:
        cache = form.cache_of(alone, ops, blocks, page, "float32")
        return mtp(next_ids, mtp.reads(h, norm), batch, cache)

    return draft


def _no_head() -> Weight:
    raise AssertionError("a single layer has no head")


_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")  # of the main ones, in MTP layers
