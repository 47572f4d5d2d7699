"""Weights of the CPU backend: packed from a checkpoint, or mapped from a packed file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from farthing import _native
from farthing.cpus import own_cpus
from farthing.lazy import torch
from farthing.ops.api import HostOps
from farthing.ops.arrays import (
    address,
    as_float32,
    host,
    like,
)
from farthing.ops.cpu import stack as indexing
from farthing.ops.cpu.formats import F32, HELD, Plan, for_head, pack, pack_dense, plan
from farthing.ops.cpu.packed import PackedFile, write_packed
from farthing.ops.cpu.placement import check_placement
from farthing.ops.cpu.stack import vector
from farthing.ops.cut import columns_of, halves_of
from farthing.ops.specs import (
    SILU,
    AttentionSpec,
    CompressedParts,
    CompressedSpec,
    DeltaParts,
    DeltaSpec,
    Gate,
    GroupedParts,
    GroupedSpec,
    IndexerSpec,
    MoEWeights,
    RouterSpec,
    StreamParts,
    StreamSpec,
)
from farthing.ops.weights import (
    InputRounding,
    Weight,
    in_one_format,
    inputs_of,
    loaded_as,
    measured_for,
)

if TYPE_CHECKING:
    from torch import Tensor


log = logging.getLogger(__name__)


@cache
def _say_floats(stored: tuple[str, ...]) -> None:
    log.warning("matrices in %s become float32, because no kernel reads them", " and ".join(stored))


@dataclass(frozen=True, slots=True)
class Host:
    """As much of a `torch.device` as the engine reads."""

    type: str = "cpu"


HOST = Host()


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed projection [n, k]."""

    packed: Any
    n: int
    k: int
    rest: Any = None  # the other columns if the product is summed in two parts

    @property
    def shape(self) -> tuple[int, int]:
        """As of a table that is not packed."""
        return self.n, self.k


@dataclass(slots=True)
class Experts:
    """A packed MoE layer or gated MLP."""

    native: Any
    spec: RouterSpec | None


@dataclass(frozen=True, slots=True)
class _Mlp:
    """A packed part of an MLP."""

    gate_up: Any
    down: Any
    gate_up_bias: Tensor | None = None  # in the order of gate_up's rows
    down_bias: Tensor | None = None

    def add_to(self, native: Any) -> None:
        """As the next part of an expert; native code copies the biases."""
        biases = (0 if b is None else address(b) for b in (self.gate_up_bias, self.down_bias))
        native.add(self.gate_up, self.down, *biases)


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention's heads, with W_UK and W_UV packed per head if they are latent, or a recurrence's; owns the
    tensors that native code points to."""

    native: Any
    width: int  # columns of the output
    eps: float  # of its norms
    alive: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Compressed:
    """Heads of a compressed past; owns the tensors that native code points to."""

    spec: CompressedSpec
    native: Any
    alive: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Streams:
    """Hyper-connections; owns the tensors that native code points to."""

    native: Any
    spec: StreamSpec
    width: int  # of one stream
    mixed: int  # numbers per token for `spread`
    alive: tuple[Any, ...]


class PackingOps(HostOps):
    """The part of `CpuOps` that packs, owns and saves weights."""

    def __init__(
        self,
        threads: int,
        quantization: str | None = None,
        packed: str | None = None,
        isa: str = "auto",
        topology: str = "",
        parts: int = 1,
        invariant: bool = False,
        arrays: bool = False,
        exact: bool = False,
    ) -> None:
        """parts: halves of the columns of row-parallel products (o_proj, down_proj) summed separately.

        topology: simulated memory nodes; by default the real ones. arrays: tensors are numpy arrays.
        invariant: with no form whose rounding depends on the size of a step: neither expanded attention
        (`expanded.h`) nor blocks of columns on AMX tiles (`amx_blocks.inl`), which `exact` does
        not take either: with it, an input of integer matrices is two integers (Act in `matrix.h`).
        """
        self.arrays = arrays
        self.device = HOST if arrays else torch.device("cpu")  # type: ignore[assignment]
        if not arrays:
            self.dtype = torch.float32
        cpus = own_cpus()
        if topology or len(cpus.nodes) > min(threads, _native.MOST_NODES):
            # Bound, processes of few threads would all share the first nodes.
            self._native = _native.Backend(threads, isa, topology)
        else:
            self._native = _native.Backend(threads, isa, cpus.topology, cpus.pinned)
            self._native.copies_files = len(cpus.nodes) < cpus.machine_nodes
        if invariant:
            self._native.expand_tokens = self._native.tile_tokens = 0
        if exact:
            self._native.tile_tokens, self._native.input_terms = 0, 2
        form = f"cpu/{self._native.isa}{' exact' if exact else ''}"
        self.name = f"{form}, {threads} thread{'s' if threads > 1 else ''}"
        self._parts = parts
        self._file = PackedFile(packed) if packed else None
        if self._file and quantization not in (None, self._file.quantization):
            raise ValueError(
                f"quantization: got {quantization!r}; expected the packed file's "
                f"{self._file.quantization!r}; omit it or pack {packed!r} again"
            )
        self._quantization = self._file.quantization if self._file else quantization
        self.packed_from = self._file.source if self._file else None
        if self._file:
            if self._file.sparse_for not in (None, "", ours := measured_for(self._native.isa)):
                log.warning(
                    "packed file %s: which matrices leave out zero blocks was chosen for %s, not for %s; "
                    "for full speed pack the model again on this machine",
                    packed, self._file.sparse_for, ours,
                )  # fmt: skip
            self._file.check_in_background()
        self._blobs: dict[str, Any] = {}
        self._inputs: dict[str, InputRounding] = {}  # for matrices whose checkpoint specifies it

    def tensor(self, values: NDArray[Any]) -> Tensor:
        return values if self.arrays else torch.from_numpy(values)  # type: ignore[return-value]

    def verify_packed(self) -> None:
        """Verify every checksum of a mapped packed file. Raises ValueError naming the first mismatch."""
        if self._file is not None:
            self._file.verify()

    def check_placement(self) -> None:
        check_placement(self._native.node_memory)
        self._native.free_caller()  # a thread that loads a model does not stay on the first node

    def coarse(self) -> Self:
        if self._quantization is not None:
            return self
        other = copy(self)
        other._quantization = "int8"
        return other

    def _keep(self, name: str, blob: Any) -> Any:
        if name in self._blobs:
            raise ValueError(f"weight name {name!r} was packed twice; expected every name once")
        self._blobs[name] = blob
        return blob

    def forget(self, prefix: str) -> None:
        for name in [n for n in self._blobs if n.startswith(prefix)]:
            del self._blobs[name]

    def _stored(self, name: str) -> Any | None:
        """The packed matrix of that name from the file, if present."""
        if self._file is None or name not in self._file:
            return None
        try:
            packed = self._native.view(*self._file.matrix(name))
        except ValueError as error:
            raise ValueError(f"packed file {str(self._file.path)!r}: {name!r}: {error}") from None
        packed = self._keep(name, self._round_inputs(name, packed, self._file.inputs(name)))
        if (order := f"{name}.order") in self._file:
            packed.reorder(address(self._keep(order, self.tensor(self._file.array(order)))))
        if (following := self._stored(f"{name}.next")) is not None:
            packed.follow(following)
        return packed

    def _pack(self, name: str, weights: Sequence[Weight], interleave: bool = False, mlp: bool = False) -> Any:
        return self._pack_as(plan(weights, loaded_as(self._quantization, mlp)), name, weights, interleave)

    def _pack_as(self, target: Plan, name: str, weights: Sequence[Weight], interleave: bool = False) -> Any:
        if target == F32 and any(w.format != "dense" for w in weights):
            _say_floats(tuple(f"{w.format} in groups of {w.group_size}" for w in weights))
        try:
            packed = pack(self._native, weights, target, interleave)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if packed.ordered:
            self._keep(f"{name}.order", weights[0].order)
        return self._keep(name, self._round_inputs(name, packed, inputs_of(weights)))

    def _round_inputs(self, name: str, packed: Any, inputs: InputRounding | None) -> Any:
        if inputs is not None:
            self._inputs[name] = inputs
            if inputs.scale is None:
                packed.round_inputs(inputs.top, inputs.clip)
            else:
                packed.fix_input_scale(inputs.scale)
        return packed

    def _tensor(self, name: str, value: Callable[[], Tensor]) -> Tensor:
        if self._file is not None and name in self._file:
            return self._keep(name, self.tensor(self._file.array(name)))  # type: ignore[no-any-return]
        return self._keep(name, vector(value()))  # type: ignore[no-any-return]

    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]], heads: int = 1) -> Linear:
        if self._parts > 1 and heads % self._parts == 0:
            (whole,) = weights()
            halves = columns_of(whole, whole.shape[1] // 2)
            first, rest = (self._pack(f"{name}.part{p}", [half]) for p, half in enumerate(halves))
            return Linear(first, *whole.shape, rest)
        packed = self._stored(name)
        if packed is None:
            packed = self._pack_rows(name, weights())
        return Linear(packed, *packed.shape)

    def _pack_rows(self, name: str, weights: Sequence[Weight]) -> Any:
        """Matrices stacked along their rows: those of one format together, others as `Packed::next`."""
        target = plan(weights[:1], quantization := loaded_as(self._quantization, mlp=False))
        here = list(takewhile(lambda w: plan([weights[0], w], quantization) == target, weights))
        packed = self._pack_as(target, name, here)
        if len(here) < len(weights):
            packed.follow(self._pack_rows(f"{name}.next", weights[len(here) :]))
        return packed

    def pack_table(self, name: str, weight: Callable[[], Weight], head: Linear | None = None) -> Any:
        table = weight()
        if _is_table(head, table.format):
            return head
        if table.format == "dense":
            return super().pack_table(name, lambda: table)
        packed = self._pack_as(plan([table], None), name, [table])
        del self._blobs[name]  # a packed file has no embedding
        return Linear(packed, *packed.shape)

    def pack_head(self, name: str, weight: Callable[[], Weight]) -> Linear:
        packed = self._stored(name)
        if packed is None:
            w = weight()
            shared = plan([w], loaded_as(self._quantization, mlp=False))
            packed = self._pack_as(for_head(shared, *w.shape), name, [w])
        return Linear(packed, *packed.shape)

    def _mlp(self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]]) -> list[_Mlp]:
        """One per part."""
        if self._parts > 1:
            return [self._pack_mlp(f"{name}.part{p}", w) for p, w in enumerate(halves_of(weights()))]
        gate_up, down = self._stored(f"{name}.gate_up"), self._stored(f"{name}.down")
        if gate_up is None or down is None:
            return [self._pack_mlp(name, weights())]
        names = (f"{name}.gate_up_bias", f"{name}.down_bias")
        biases = (
            self._tensor(n, _missing) if self._file is not None and n in self._file else None for n in names
        )
        return [_Mlp(gate_up, down, *biases)]

    def _pack_mlp(self, name: str, weights: tuple[Weight, Weight, Weight]) -> _Mlp:
        w_gate, w_up = in_one_format(weights[:2])
        w_down = weights[2]
        gate_up = self._pack(f"{name}.gate_up", [w_gate, w_up], interleave=True, mlp=True)
        down = self._pack(f"{name}.down", [w_down], mlp=True)
        of_rows, of_columns = None, None
        if w_gate.bias is not None and w_up.bias is not None:
            pair = [w_gate.bias, w_up.bias]
            of_rows = self._tensor(f"{name}.gate_up_bias", lambda: _interleaved(pair))
        if (bias := w_down.bias) is not None:
            of_columns = self._tensor(f"{name}.down_bias", lambda: bias)
        return _Mlp(gate_up, down, of_rows, of_columns)

    def pack_mlp(
        self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]], activation: Gate = SILU
    ) -> Experts:
        native = _native.Moe(_native.Router(), None, True, self._parts)
        native.activate(*astuple(activation))
        for part in self._mlp(name, weights):
            part.add_to(native)
        return Experts(native, None)

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Experts:
        stored = self._file is not None and f"{name}.gate" in self._file
        w = None if stored else weights()
        if spec.num_experts > _native.MOST_EXPERTS:
            raise ValueError(
                f"num_experts {spec.num_experts} of {name!r} is not supported; "
                f"expected at most {_native.MOST_EXPERTS}"
            )
        gate = (
            self._stored(f"{name}.gate")
            if w is None
            else self._keep(f"{name}.gate", pack_dense(self._native, _gate_rows(w), False))
        )
        router = router_of(spec)
        has_bias = (
            f"{name}.bias" in self._file if w is None and self._file else w is not None and w.bias is not None
        )
        if has_bias:
            router.bias = self._tensor(f"{name}.bias", lambda: w.bias).tolist()  # type: ignore[union-attr, arg-type, return-value]
        shared = (
            f"{name}.shared.down" in self._file
            if w is None and self._file
            else w is not None and w.shared is not None
        )
        shared = shared and not self.routed_only
        for vector_name in ("logit_bias", "expert_scale"):
            key, given = f"{name}.{vector_name}", None if w is None else getattr(w, vector_name)
            if given is not None or (w is None and self._file and key in self._file):
                values = self._tensor(key, lambda given=given: given)  # type: ignore[misc]
                setattr(router, vector_name, values.tolist())
        native = _native.Moe(router, gate, shared, self._parts)
        native.activate(*astuple(spec.gate))
        loads = self._stored_experts(name, spec.num_experts) if w is None else w.experts
        if None in loads:
            self._keep(
                f"{name}.held", self.tensor(np.array([e for e, load in enumerate(loads) if load is not None]))
            )
        for e, expert in enumerate(loads):
            if expert is None:  # on another rank, or an identity
                for _ in range(self._parts):
                    native.add(None, None)
                continue
            for part in self._mlp(f"{name}.experts.{e}", expert):
                part.add_to(native)
        if all(load is None for load in loads):
            raise ValueError(f"no expert of {name!r} is on this rank; expected at least one per rank")
        if shared:
            load = _missing if w is None or w.shared is None else w.shared
            for part in self._mlp(f"{name}.shared", load):
                part.add_to(native)
        return Experts(native, spec)

    def _stored_experts(self, name: str, count: int) -> list[Callable[[], Any] | None]:
        """Experts in a packed file: all of them, or those of one rank."""
        assert self._file is not None
        if f"{name}.held" not in self._file:
            return [_missing] * count
        stored = set(self._file.array(f"{name}.held").tolist())
        return [_missing if e in stored else None for e in range(count)]

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Heads:
        if self._file is not None and f"{name}.norm" in self._file:
            norm = self._tensor(f"{name}.norm", _missing)
            heads = [
                (self._stored(f"{name}.uk.{h}"), self._stored(f"{name}.uv.{h}"))
                for h in range(spec.num_heads)
            ]
        else:
            kv_b, kv_norm = weights()
            norm = self._tensor(f"{name}.norm", lambda: kv_norm)
            heads = self._pack_heads(name, spec, kv_b)
        rope = vector(rope)
        native = _native.Attention(
            spec.num_heads, spec.nope_dim, spec.rope_dim, spec.value_dim, spec.latent_dim, spec.scale,
            spec.interleaved, address(norm), address(rope[0]), address(rope[1]),
        )  # fmt: skip
        for uk, uv in heads:
            native.add(uk, uv)
        return Heads(native, spec.num_heads * spec.value_dim, spec.norm_eps, (norm, rope))

    def _pack_heads(self, name: str, spec: AttentionSpec, kv_b: Weight) -> list[tuple[Any, Any]]:
        """W_UK transposed [c, n] and W_UV [v, c] per head; int8 if weights are rounded."""
        quantized = self._quantization is not None or kv_b.format != "dense" or kv_b.rounded
        dense = kv_b.data if kv_b.format == "dense" else kv_b.dequantize()
        heads = dense.reshape(spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
        w_uk, w_uv = heads[:, : spec.nope_dim], heads[:, spec.nope_dim :]
        return [
            (
                self._keep(f"{name}.uk.{h}", pack_dense(self._native, w_uk[h].T, quantized)),
                self._keep(f"{name}.uv.{h}", pack_dense(self._native, w_uv[h], quantized)),
            )
            for h in range(spec.num_heads)
        ]

    def pack_grouped(self, spec: GroupedSpec, parts: GroupedParts, rope: Tensor) -> Heads:
        rope, d = vector(rope), spec.head_dim
        found = (parts.bias, parts.q_norm, parts.k_norm, parts.sinks, parts.v_norm)
        kept = [None if p is None else vector(p) for p in found]
        native = _native.Attention(
            spec.num_heads, 0, spec.turning or d, d, d, spec.scale, spec.interleaved, 0, address(rope[0]),
            address(rope[1]),
        )  # fmt: skip
        bias, q_norm, k_norm, sinks, v_norm = (0 if part is None else address(part) for part in kept)
        native.group(
            spec.kv_heads, spec.rope_dim, bias, q_norm, k_norm, spec.whole_norm, spec.gated, spec.window or 0,
            sinks, v_norm, *(spec.cache_scales or (0.0, 0.0)),
        )  # fmt: skip
        alive = (rope, *(part for part in kept if part is not None))
        return Heads(native, spec.num_heads * d, spec.norm_eps, alive)

    def pack_delta(self, name: str, spec: DeltaSpec, parts: Callable[[], DeltaParts]) -> Heads:
        stored = self._file is not None and f"{name}.conv" in self._file
        found = None if stored else parts()
        conv, rate, shift, norm = (
            self._tensor(f"{name}.{part}", lambda part=part: getattr(found, part))  # type: ignore[misc]
            for part in ("conv", "rate", "shift", "norm")
        )
        native = _native.Delta(
            spec.key_heads, spec.value_heads, spec.key_dim, spec.value_dim, spec.width,
            address(conv), address(rate), address(shift), address(norm),
        )  # fmt: skip
        return Heads(native, spec.values, spec.norm_eps, (conv, rate, shift, norm))

    def pack_compressed(
        self, name: str, spec: CompressedSpec, parts: Callable[[], CompressedParts], rope: Tensor
    ) -> Compressed:
        stored = self._file is not None and f"{name}.norm" in self._file
        found = None if stored else parts()
        count = len(spec.pooled)
        own: dict[str, Callable[[], Tensor]] = {
            "norm": lambda: found.norm,  # type: ignore[union-attr]
            "sinks": lambda: found.sinks,  # type: ignore[union-attr]
        }
        for i in range(count):
            own[f"pool.{i}.bias"] = lambda i=i: found.pools[i].bias  # type: ignore[misc, union-attr]
            own[f"pool.{i}.norm"] = lambda i=i: found.pools[i].norm  # type: ignore[misc, union-attr]
        norm, sinks, *pools = (self._tensor(f"{name}.{part}", value) for part, value in own.items())
        rope = vector(rope)
        cos, sin = address(rope[0]), address(rope[1])
        index, dims = spec.index, (spec.head_dim, spec.index.head_dim if spec.index else 0)
        attention = _native.Attention(
            spec.num_heads, 0, 0, spec.head_dim, spec.head_dim, spec.head_dim**-0.5, True, 0, cos, sin
        )
        attention.prepare(address(sinks))
        selects = None if index is None else indexing.pack(replace(index, rope_dim=0), norm, norm, rope)
        native = _native.Compressed(
            spec.num_heads, spec.head_dim, spec.rope_dim, index.num_heads if index else 0, dims[1],
            spec.window, spec.rate, index is not None, spec.norm_eps, address(norm), cos, sin, attention,
            selects and selects.native,
            [(dims[i], address(pools[2 * i]), address(pools[2 * i + 1])) for i in range(count)],
        )  # fmt: skip
        return Compressed(spec, native, (norm, sinks, rope, *pools, attention, selects))

    def pack_streams(
        self, name: str, spec: StreamSpec, hidden: int, parts: Callable[[], StreamParts]
    ) -> Streams:
        packed = self._stored(f"{name}.fn")
        found = parts() if packed is None else None
        base = self._tensor(f"{name}.base", lambda: found.base)  # type: ignore[union-attr]
        scale = self._tensor(f"{name}.scale", lambda: found.scale)  # type: ignore[union-attr]
        columns = min(hidden, _STREAM_COLUMNS)
        if found is not None:
            product = _by_columns(found.weight, spec.count, columns)
            packed = self._keep(f"{name}.fn", pack_dense(self._native, product, False))
        n, ends = spec.count, len(base) == spec.count
        native = _native.Streams(
            n, hidden, columns, spec.steps, spec.eps, spec.norm_eps, ends, packed, address(base),
            address(scale),
        )  # fmt: skip
        return Streams(native, spec, hidden, 0 if ends else n * (n + 1), (base, scale, packed))

    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> indexing.Indexer:
        weight = self._tensor(f"{name}.weight", lambda: norm()[0])
        bias = self._tensor(f"{name}.bias", lambda: norm()[1])
        return indexing.pack(spec, weight, bias, vector(rope))

    def packed_weights(self) -> Iterable[tuple[str, Any]]:
        """Everything packed so far by name, in order."""
        return self._blobs.items()

    def input_rounding(self) -> Mapping[str, InputRounding]:
        """Of the matrices whose checkpoint specifies it."""
        return self._inputs

    def save_packed(self, path: str) -> None:
        write_packed(
            path, self._quantization, self._blobs.items(), self.source, self._inputs, self._native.isa
        )


def _is_table(head: Linear | None, stored: str) -> bool:
    """Whether `embed` reads the packed head instead of a table of this format with the same weights: it has
    the same values, or those of a dense table in 8 bits."""
    if head is None or head.packed.sparse:
        return False
    held = HELD.get(head.packed.format, "int8")  # Q8_PLANES
    return held == ("int8" if stored == "dense" else stored)


_STREAM_COLUMNS = 512  # of each stream, which native code multiplies at once


def _by_columns(weight: Tensor, streams: int, columns: int) -> Tensor:
    """A product with all streams [rows, n D] as products with `columns` of each of them, one below the other:
    [units rows, n columns], where rows are padded to panels."""
    rows, width = weight.shape
    by_stream = host(weight).reshape(rows, streams, width // streams)
    padded = np.pad(by_stream, ((0, -rows % 16), (0, 0), (0, -(width // streams) % columns)))
    units = padded.reshape(*padded.shape[:2], -1, columns).transpose(2, 0, 1, 3)
    return like(np.ascontiguousarray(units.reshape(-1, streams * columns)), weight)


def _gate_rows(w: MoEWeights) -> Tensor:
    """The router's rows, and the row of the shared expert's gate."""
    if w.shared_gate is None:
        return w.gate
    return like(np.concatenate((host(w.gate), host(w.shared_gate))), w.gate)


def _interleaved(biases: Sequence[Tensor]) -> Tensor:
    """Of gate and up [I], in the order of their interleaved panels of 16 rows, with zeros for padding."""
    padded = [np.pad(host(as_float32(b)), (0, -len(b) % 16)).reshape(-1, 16) for b in biases]
    return like(np.stack(padded, 1).reshape(-1), biases[0])


def _missing() -> Any:
    raise ValueError("the packed file lacks a part of this layer; pack the model again")


SCORING = ("sigmoid", "softmax", "sqrtsoftplus")  # in the order of native/layers/backend.h


def router_of(spec: RouterSpec) -> Any:
    """The native router of a layer."""
    router = _native.Router()
    router.experts, router.top_k = spec.num_experts, spec.top_k
    router.identities = spec.identities
    router.groups, router.top_k_groups = spec.num_groups, spec.top_k_groups
    router.scoring, router.top2_sum = SCORING.index(spec.scoring), spec.group_score == "top2_sum"
    router.normalize, router.scale = spec.normalize, spec.scale
    router.mass = -1.0 if spec.mass is None else spec.mass
    router.min_experts = spec.min_experts
    return router
