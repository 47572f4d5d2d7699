"""`GpuOps`: the op signatures over Triton kernels. Legend: see `farthing.ops.api`.

Two products use torch (cuBLAS): the router's float32 logits, and the small products per head around absorbed
attention. DeepSeek-V4's ops are in `hyper.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.api import (
    ALL,
    Batch,
    CacheDtype,
    Handle,
    LatentCache,
    LayerHandles,
    Norm,
    Place,
    StreamedHandles,
    plain_layers,
)
from farthing.ops.reference import (
    Grouped,
    capped,
    identity_weight,
    largest,
    pack_grouped,
    scaled_choice,
    shared_weight,
)
from farthing.ops.reference import route as weigh
from farthing.ops.sampling import Filters
from farthing.ops.specs import (
    SILU,
    AttentionSpec,
    DeltaParts,
    DeltaSpec,
    Gate,
    GroupedParts,
    GroupedSpec,
    IndexerSpec,
    MoEWeights,
    RouterSpec,
)
from farthing.ops.torch_util import DeviceCopies
from farthing.ops.weights import Weight, in_one_format, rounded, static_scale
from farthing_gpu import delta as recurrence
from farthing_gpu import gemm
from farthing_gpu import sample as normalize
from farthing_gpu.attend import Heads, Plan, attend, attend_grouped, expand_from, plan
from farthing_gpu.gemm import Part, combine, experts_mlp, find
from farthing_gpu.hyper import StreamedOps
from farthing_gpu.launch import INTERPRETED, DecodeGraphs, is_decode, rows
from farthing_gpu.matrix import Matrix, MatrixStack, in_blocks, kind_of, pack, pair, stack_rows
from farthing_gpu.route import index, pack_indexer, route, sort_by_expert
from farthing_gpu.sample import sample_filtered, sample_tokens

Gated = tuple[Weight, Weight, Weight]
_FP8_CAPABILITY = (8, 9)  # Ada and Hopper have FP8 tensor cores


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP, or a stack of them."""

    gate_up: Matrix
    down: Matrix
    biases: tuple[Tensor, Tensor] | None = None  # float32, of gate and up [E, 2, I] and of down [E, D]
    activation: Gate = SILU


@dataclass(frozen=True, slots=True)
class Routed:
    """Experts of equal formats."""

    mlp: Mlp
    local: Tensor | None  # [E] int32, index of an expert in the stack or -1; None: all are in it


@dataclass(slots=True)
class Experts:
    """A router and its experts."""

    spec: RouterSpec
    gate: Tensor  # [E, D] float32
    bias: Tensor | None
    routed: tuple[Routed, ...]  # by format
    local: Tensor | None  # [E] int32, -1: an expert is not on this rank; None: all are
    shared: Mlp | None
    shared_gate: Tensor | None
    logit_bias: Tensor | None
    expert_scale: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Layers computed in one call; decode steps run as one graph."""

    layers: tuple[LayerHandles, ...]


class GpuOps(StreamedOps):
    """Every op on one CUDA device; activations are bfloat16 or float32, and FP8 if the weights are."""

    def __init__(self, dtype: torch.dtype, device: torch.device, quantization: str | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.cache_dtype = "float32" if dtype is torch.float32 else "bfloat16"
        what = "interpreted on the CPU" if INTERPRETED else torch.cuda.get_device_name(device)
        self.name = f"gpu/triton {str(dtype).removeprefix('torch.')}, {what}"
        self._quantization = quantization
        self._fp8 = INTERPRETED or torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
        self._here = DeviceCopies(device)
        self._planned: tuple[Tensor, Plan] | None = None
        self._graphs = DecodeGraphs()

    # -- packing

    def _matrix(self, weight: Weight, inputs: float | None, quantize: bool = True) -> Matrix:
        # Matrices outside of feed-forwards have been rounded in `pack_linear`.
        weight = rounded(weight, self._quantization, mlp=True, codes=False)
        return pack(weight, self.dtype, self.device, self._fp8, inputs, quantize)

    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]], heads: int = 1) -> list[Part]:
        parts: list[Part] = []
        run: list[Matrix] = []  # adjacent matrices that can be merged
        stacked = [rounded(w, self._quantization) for w in weights()]
        inputs = static_scale(stacked)
        for w in stacked:
            sparse = find(w, self.dtype, self.device) if inputs is None else None
            if sparse is None:
                run.append(self._matrix(w, inputs))
                continue
            parts += [*stack_rows(run), sparse] if run else [sparse]
            run = []
        return parts + list(stack_rows(run)) if run else parts

    def pack_mlp(self, name: str, weights: Callable[[], Gated], activation: Gate = SILU) -> Mlp:
        gate, up, down = weights()
        gate, up = in_one_format((gate, up))
        shared = static_scale([gate, up])
        alike = in_blocks(gate) == in_blocks(down)  # a kernel's output is FP8 if its weights are
        biases = None
        if gate.bias is not None and up.bias is not None:
            first = torch.stack((gate.bias, up.bias))
            # On the other ranks of tensor parallelism down's is missing: it is added once.
            last = torch.zeros(down.shape[0]) if down.bias is None else down.bias
            biases = (self._vector(first[None]), self._vector(last[None]))
        return Mlp(
            pair(self._matrix(gate, shared, alike), self._matrix(up, shared, alike)),
            self._matrix(down, static_scale([down]), alike),
            biases,
            activation,
        )

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Experts:
        w = weights()
        here = [e for e, load in enumerate(w.experts) if load is not None]
        if not here:
            raise ValueError(f"no expert of {name!r} is on this rank; expected at least one per rank")
        return Experts(
            spec,
            w.gate.float().to(self.device),
            None if w.bias is None else w.bias.float().to(self.device),
            tuple(self._stacks(name, w, here, spec.gate)),
            self._index(here, len(w.experts)),
            None if w.shared is None else self.pack_mlp(f"{name}.shared", w.shared, spec.gate),
            None if w.shared_gate is None else w.shared_gate.float().to(self.device),
            *(None if b is None else b.float().to(self.device) for b in (w.logit_bias, w.expert_scale)),
        )

    def _stacks(self, name: str, w: MoEWeights, here: list[int], activation: Gate) -> Iterator[Routed]:
        gate_up: dict[object, MatrixStack] = {}  # these by the kind of an expert
        down: dict[object, MatrixStack] = {}
        biases: dict[object, list[tuple[Tensor, Tensor]]] = {}
        experts: dict[object, list[int]] = {}
        for at, e in enumerate(here):
            load = w.experts[e]
            assert load is not None
            expert = self.pack_mlp(f"{name}.experts.{e}", load)
            kind = kind_of(expert.gate_up), kind_of(expert.down), expert.biases is None
            gate_up.setdefault(kind, MatrixStack(len(here) - at)).add(expert.gate_up)
            down.setdefault(kind, MatrixStack(len(here) - at)).add(expert.down)
            biases.setdefault(kind, []).extend([] if expert.biases is None else [expert.biases])
            experts.setdefault(kind, []).append(e)
        for each, held in experts.items():
            first, last = (
                (torch.cat(parts) for parts in zip(*biases[each], strict=True))
                if biases[each]
                else (None, None)
            )
            both = None if first is None or last is None else (first, last)
            stack = Mlp(gate_up.pop(each).matrix(), down.pop(each).matrix(), both, activation)
            yield Routed(stack, self._index(held, len(w.experts)))

    def _index(self, here: list[int], experts: int) -> Tensor | None:
        """[E] the index of each of `here`, -1 of others; None if they are all."""
        if len(here) == experts:
            return None
        index = torch.full((experts,), -1, dtype=torch.int32)
        index[here] = torch.arange(len(here), dtype=torch.int32)
        return index.to(self.device)

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Heads:
        kv_b, norm = weights()
        value = rounded(kv_b, self._quantization).dequantize(self.dtype).to(self.device)
        heads = value.view(spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
        return Heads(spec, heads.contiguous(), self._vector(norm), self._here(rope))

    def pack_grouped(self, spec: GroupedSpec, parts: GroupedParts, rope: Tensor) -> Grouped:
        return pack_grouped(spec, parts, rope, self._here)

    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> Handle:
        weight, bias = norm()
        return pack_indexer(spec, self._vector(weight), self._vector(bias), self._here(rope))

    def pack_delta(self, name: str, spec: DeltaSpec, parts: Callable[[], DeltaParts]) -> Handle:
        return recurrence.pack(spec, parts(), self._vector)

    def new_cache(
        self, layers: int, num_blocks: int, block_size: int, width: int, dtype: CacheDtype
    ) -> LatentCache:
        if dtype == "fp8" and not self._fp8:
            raise ValueError(
                f"the cache's dtype is 'fp8', which {self.name} does not have (Ada and Hopper do); "
                f"expected 'bfloat16' or 'int8'"
            )
        return super().new_cache(layers, num_blocks, block_size, width, dtype)

    def _vector(self, weight: Tensor) -> Tensor:
        """A norm's weight, float32 and contiguous."""
        return self._here(weight).float().contiguous()

    def _here_norm(self, norm: Norm) -> Norm:
        return Norm(self._vector(norm.weight), norm.eps)

    # -- computing

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, self._here(table)).to(self.dtype)

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return normalize.rms_norm(rows(x), self._here_norm(norm))

    def linear(
        self, x: Tensor, weight: list[Part], norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return self._linear(x, weight, norm, residual, self.dtype)

    def _linear(
        self, x: Tensor, weight: list[Part], norm: Norm | None, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        first = weight[0]
        columns = first.k - (first.padding if isinstance(first, Matrix) else 0)
        if x.shape[1] != columns:
            raise ValueError(f"x has {x.shape[1]} columns; expected {columns}, the weight's")
        here = None if norm is None else self._here_norm(norm)
        return gemm.linear(rows(x), weight, here, residual, dtype)

    def mla(self, q: Tensor, kv: Tensor, heads: Heads, place: Place, select: Tensor | None = None) -> Tensor:
        return attend(rows(q), rows(kv), heads, place, self._plan(place.batch, heads), select)

    def gqa(self, qkv: Tensor, heads: Grouped, place: Place) -> Tensor:
        return attend_grouped(rows(qkv), heads, place, self._plan(place.batch, heads))

    def delta(self, x: Tensor, gates: Tensor, delta: Handle, place: Place) -> Tensor:
        return recurrence.advance(rows(x), rows(gates), delta, place)

    def _plan(self, batch: Batch, heads: Heads | Grouped) -> Plan:
        """A step's plan is the same for all layers, so it is made and read back from the device once."""
        step = batch.query_start  # batches of other kinds of layers share it
        if self._planned is None or self._planned[0] is not step:
            self._planned = (step, plan(batch, expand_from(heads)))
        return self._planned[1]

    def index(self, q: Tensor, k: Tensor, w: Tensor, indexer: Handle, place: Place) -> Tensor | None:
        return index(q, k, w, indexer, place)

    def mlp(self, x: Tensor, weights: Mlp, norm: Norm, residual: bool = True) -> Tensor:
        n = self.rms_norm(x, norm)
        none = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
        added_to = rows(x) if residual else torch.zeros_like(x)
        return combine(n, none, None, self._gated(n, weights), added_to)

    def _gated(self, n: Tensor, weights: Mlp) -> Tensor:
        """One MLP for all tokens: a grouped product with one group."""
        tokens = n.shape[0]
        order = torch.arange(tokens, dtype=torch.int32, device=n.device)
        starts = torch.arange(0, 2 * max(1, tokens), max(1, tokens), dtype=torch.int32, device=n.device)
        return self._grouped(n, weights, order, starts, 1, None)

    def _grouped(
        self, n: Tensor, weights: Mlp, order: Tensor, starts: Tensor, slots: int, gates: Tensor | None,
        y: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if weights.gate_up.inputs is not None:
            n = gemm.to_integers(n, weights.gate_up.inputs[0])  # experts of a layer share their input's range
        x, scale = normalize.quantize(n) if weights.gate_up.format == "fp8" else (n, None)
        return experts_mlp(
            x, scale, weights.gate_up, weights.down, order, starts, slots, gates, self.dtype,
            activation=weights.activation, biases=weights.biases, y=y,
        )  # fmt: skip

    def moe(
        self, x: Tensor, weights: Experts, norm: Norm, counts: Tensor | None = None, residual: bool = True,
        chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return self._moe(x, weights, norm, counts, None, residual, chosen)

    def _moe(
        self, x: Tensor, weights: Experts, norm: Norm, counts: Tensor | None, live: Tensor | None,
        residual: bool = True, chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        n = self.rms_norm(x, norm)
        if chosen is None:
            ids, gates = self._route(n, weights, live)
        else:
            ids, gates = weigh(F.linear(n.float(), weights.gate), None, weights.spec, chosen.long())
        if counts is not None:
            seen = ids.flatten()
            counts.scatter_add_(0, seen.clamp_min(0), (seen >= 0).to(counts.dtype))
        y = torch.empty(ids.numel(), n.shape[1], dtype=self.dtype, device=n.device)
        for routed in weights.routed:
            order, starts = sort_by_expert(ids, routed.mlp.down.data.shape[0], routed.local)
            self._grouped(n, routed.mlp, order, starts, ids.shape[1], gates, y)
        shared = None if weights.shared is None else self._gated(n, weights.shared)
        if shared is not None and weights.shared_gate is not None:
            shared = shared_weight(n, weights.shared_gate) * shared.float()
        if weights.spec.identities:
            same = n.float() * identity_weight(ids, gates, weights.spec)
            shared = same if shared is None else shared.float() + same
        return combine(y, ids, weights.local, shared, rows(x) if residual else torch.zeros_like(x))

    def reroute(self, weights: Experts, spec: RouterSpec) -> None:
        weights.spec = spec
        self._graphs = DecodeGraphs()  # existing graphs have captured the old rule

    def route(self, n: Tensor, weights: Experts) -> tuple[Tensor, Tensor]:
        return self._route(n, weights, None)

    def _route(self, n: Tensor, weights: Experts, live: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = F.linear(n.float(), weights.gate, weights.logit_bias)
        return scaled_choice(*route(logits, weights.bias, weights.spec, live), weights.expert_scale)

    def stack(
        self, layers: Sequence[LayerHandles | StreamedHandles], ending: Handle | None = None
    ) -> Stack | None:
        if (plain := plain_layers(layers)) is None:
            return None
        return Stack(tuple(plain))

    def run_stack(
        self, h: Tensor, stack: Stack, batch: Batch, cache: LatentCache, counts: Tensor | None,
        span: slice = ALL,
    ) -> Tensor:  # fmt: skip
        def run(hidden: Tensor, batch: Batch, live: Tensor | None) -> Tensor:
            step = plan(batch, expand_from(stack.layers[0].heads))
            for i in range(*span.indices(len(stack.layers))):
                layer, seen = stack.layers[i], None if counts is None else counts[i]
                place = Place(cache, i * layer.rows, batch)
                hidden = self._layer(hidden, layer, place, step, seen, live)
            return hidden

        if not is_decode(batch) or not stack.layers or span != ALL:
            return run(h, batch, None) if stack.layers else h
        where = cache.data.data_ptr(), cache.data.shape, cache.data.dtype
        key = stack, where, None if counts is None else counts.data_ptr()
        return self._graphs.run(key, run, h, batch)

    def _layer(
        self, h: Tensor, layer: LayerHandles, place: Place, step: Plan, counts: Tensor | None,
        live: Tensor | None,
    ) -> Tensor:  # fmt: skip
        qkv = self.linear(h, layer.qkv_a, layer.norm)
        if isinstance(layer.heads, Grouped):
            mixed = attend_grouped(qkv, layer.heads, place, step)
        else:
            q, kv = qkv[:, : layer.q_width], qkv[:, layer.q_width :]
            if layer.q_b is not None:
                q = self.linear(q, layer.q_b, layer.q_norm)
            mixed = attend(q, kv, layer.heads, place, step)
        if layer.o_bias is not None:
            h = h + self._here(layer.o_bias).to(h.dtype)
        h = self.linear(mixed, layer.o, residual=h)
        if isinstance(layer.feed, Experts):
            return self._moe(h, layer.feed, layer.feed_norm, counts, live)
        return self.mlp(h, layer.feed, layer.feed_norm)

    def logits(self, x: Tensor, head: list[Part], norm: Norm) -> Tensor:
        return capped(self._linear(x, head, norm, None, torch.float32), norm)

    def top_logits(self, x: Tensor, head: list[Part], norm: Norm, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return largest(self.logits(x, head, norm), k)

    def sample(self, logits: Tensor, uniform: Tensor, filters: Filters | None = None) -> Tensor:
        if filters is None:
            return sample_tokens(rows(logits), uniform)
        return sample_filtered(rows(logits), uniform, filters)
