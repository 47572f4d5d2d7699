"""The arithmetic the model is written in: one signature per op, one implementation per device.

`farthing.ops.reference` defines correct results; every other backend is tested against it.

Legend: T tokens of the step, sorted by sequence; B sequences; D hidden size; H heads; n, r, v the
nope, rotary and value head sizes; c the KV latent; E routed experts; k experts per token; V vocabulary;
L cache layers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from farthing.lazy import np, torch
from farthing.ops.arrays import all_finite, dtype_name
from farthing.ops.sampling import Filters, sample
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
from farthing.ops.weights import SharedSum, Weight

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger(__name__)
Handle = Any  # a backend's packed weight; opaque to other modules
CacheDtype = Literal["float32", "bfloat16", "fp8", "int8"]
CACHE_DTYPES: dict[str, str] = {  # names of dtypes
    "float32": "float32",
    "bfloat16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "int8": "int8",
}
CACHE_MAX = {"float8_e4m3fn": 448.0, "int8": 127.0}  # largest numbers


@dataclass(slots=True)
class IndexCache:
    """The index keys of every cached token, in the blocks of the latent cache they belong to."""

    data: Tensor  # [rows, num_blocks, block_size, d]: one row per layer that has an indexer
    scale: Tensor | None  # [rows, num_blocks, block_size] float32 for fp8 and int8

    @classmethod
    def new(cls, ops: Ops, cache: LatentCache, rows: int, width: int) -> IndexCache:
        """Empty keys for the blocks of a cache, in its dtype; width = d."""
        shape = (rows, *cache.data.shape[1:3])
        scale = None if cache.scale is None else ops.tensor(np.ones(shape, np.float32))
        return cls(ops.zeros(dtype_name(cache.data.dtype), *shape, width), scale)


@dataclass(slots=True)
class StateCache:
    """What recurrent layers keep of each sequence, whatever its length. A sequence has one slot.

    Row p % (width - 1) of a tail is the convolution's input at position p, so that a step writes its own
    tokens' rows only, and a copy of a slot continues at any position.
    """

    data: Tensor  # [R, slots, Hv, dk, dv] float32: one row per recurrent layer
    tail: Tensor  # [R, slots, width - 1, C] float32

    @classmethod
    def new(cls, ops: Ops, layers: int, slots: int, spec: DeltaSpec) -> StateCache:
        """Slots for sequences; they need no clearing before a sequence starts."""
        return cls(*(ops.zeros("float32", layers, slots, *each) for each in spec.state))

    def tensors(self) -> list[Tensor]:
        """All tensors, each [R, slots, …]."""
        return [self.data, self.tail]


@dataclass(slots=True)
class OpenCache:
    """The tokens of which layers with a compressed past will make entries. A sequence has one slot.

    Row p % open_tokens holds the pooled columns (`CompressedSpec`) of position p, so that a step writes its
    own tokens' rows only, and a copy of a slot continues at any position.
    """

    rows: dict[int, Tensor]  # by rate [layers, slots, open_tokens, columns] float32

    def tensors(self) -> list[Tensor]:
        """All tensors, each [layers, slots, …]."""
        return list(self.rows.values())


ALL = slice(None)  # every layer of a stack


@dataclass(slots=True)
class LatentCache:
    """The paged cache: (latent, rotated key) of every token, c + r values per token and layer.

    A block has the same index in every layer. Slot = block * block_size + offset. In grouped-query attention
    a layer has G rows instead of one; a row's latent is the value of a head and its rotary part the key.
    """

    data: Tensor  # [L or L G, num_blocks, block_size, c + r], float32 | bfloat16 | float8_e4m3fn | int8
    scale: Tensor | None  # [L, num_blocks, block_size, 2] float32 (latent, rotary) for fp8 and int8
    index: IndexCache | None = None  # of models with sparse attention
    state: StateCache | None = None  # of models with recurrent layers; has slots instead of blocks
    open: OpenCache | None = None  # of models with a compressed past; the same slots
    # Of the layers with a window, by its size; they have blocks of their own.
    windows: dict[int, LatentCache] = field(default_factory=dict)
    # Of layers with a compressed past, by their rate: entries or, in a window's cache, the tokens in it.
    # one row per layer of that rate, with entries or tokens in the slots; the rotary part has no columns
    entries: dict[int, LatentCache] = field(default_factory=dict)

    def of(self, window: int | None) -> LatentCache:
        """The cache of the layers with this window; None: of those without."""
        return self if window is None or not self.windows else self.windows[window]

    def tensors(self) -> list[Tensor]:
        """All tensors with these blocks, each [*, num_blocks, …]: a block is a slice along dimension 1."""
        kept = [
            self.data,
            self.scale,
            *(t for past in self.entries.values() for t in (past.data, past.scale)),
        ]
        if self.index is not None:
            kept += [self.index.data, self.index.scale]
        return [t for t in kept if t is not None]

    def by_kind(self) -> list[list[Tensor]]:
        """The tensors with the same blocks, or slots: of all tokens, of each window, of states."""
        states = [kept.tensors() for kept in (self.state, self.open) if kept is not None]
        return [self.tensors(), *(own.tensors() for own in self.windows.values()), *states]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this process, also those that nothing was written to."""
        return sum(t.nbytes for kind in self.by_kind() for t in kind)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.data.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.data.shape[2]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Cache locations in the layers with a window, as in `Batch`.

    Blocks that no token of the step sees are 0 in the table and belong to others.
    """

    slots: Tensor  # [T] int64
    block_table: Tensor  # [B, max_blocks] int32


@dataclass(frozen=True, slots=True)
class Batch:
    """Positions and cache locations of one step's tokens. All tensors are contiguous."""

    positions: Tensor  # [T] int32, position of each token in its sequence
    slots: Tensor  # [T] int64, cache slot of each token's key
    query_start: Tensor  # [B + 1] int32, tokens of sequence b: query_start[b] … query_start[b + 1]
    context_lens: Tensor  # [B] int32, tokens of the sequence in the cache after this step
    block_table: Tensor  # [B, max_blocks] int32, blocks of each sequence in order
    state_slots: Tensor | None = None  # [B] int32, slot of each sequence in a `StateCache`
    # [B] int32, the slots whose states the step continues and leaves as they are; None: state_slots.
    state_sources: Tensor | None = None
    windows: dict[int, Blocks] = field(default_factory=dict)  # by size; empty: blocks are the same
    ids: Tensor | None = None  # [T] int64 tokens, of models that choose experts by them

    def of(self, window: int | None) -> Batch:
        """The batch for layers with this window; None: for those without."""
        if window is None or not self.windows:
            return self
        own = self.windows[window]
        return replace(self, slots=own.slots, block_table=own.block_table, windows={})


@dataclass(frozen=True, slots=True)
class Place:
    """Where attention or the indexer of one layer writes and reads in a step."""

    cache: LatentCache
    row: int  # the layer's first row in `cache.data`; an indexer's in `index`; a recurrence's in `state`
    batch: Batch


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS normalization."""

    weight: Tensor  # [K]
    eps: float
    cap: float = 0.0  # before an output head: its logits z become cap tanh(z / cap); 0: they do not


def no_gradients(ops: Ops) -> AbstractContextManager[Any]:
    """A context for computing with a backend's tensors."""
    return nullcontext() if ops.arrays else torch.inference_mode()


class NotFinite(ArithmeticError):
    """Logits are NaN or infinite: broken weights, or the model overflows its activation type."""


def require_finite(logits: Tensor) -> None:
    """Raises NotFinite if a row of logits [n, V] has a NaN or an infinity."""
    if not all_finite(logits.sum(-1)):  # one NaN or infinity makes a row's sum one
        raise NotFinite("logits are NaN or infinite: the weights are broken, or the model overflows")


@dataclass(frozen=True, slots=True)
class Beside:
    """An MLP next to a layer's experts: the feed is norm(mlp(input_norm(h))) + feed_norm(experts(…))."""

    mlp: Handle
    input_norm: Norm  # these [D]
    norm: Norm
    feed_norm: Norm


@dataclass(frozen=True, slots=True)
class LayerHandles:
    """A layer's packed parts for `Ops.stack`: h + attention(norm(h)), then h + feed(feed_norm(h))."""

    norm: Norm  # [D]
    qkv_a: Handle  # [q + c + r, D]; grouped: [(H + 2 G) d, D]
    q_width: int  # columns of qkv_a's output for the query, or its latent
    q_norm: Norm | None  # [q]; None with q_b
    q_b: Handle | None  # None: qkv_a computes the query directly
    heads: Handle
    o: Handle
    feed_norm: Norm  # [D]
    feed: Handle
    attention_sum: SharedSum | None = None  # over the ranks that share the heads; None: all heads are local
    feed_sum: SharedSum | None = None
    o_bias: Tensor | None = None  # [D]
    rows: int = 1  # cache rows
    window: int | None = None  # of attention
    # Of a recurrent layer: b and a [2 Hv, D]. Then qkv_a is [C + Hv dv, D], and heads `pack_delta`'s.
    gates: Handle | None = None
    # Norms [D] of the outputs of attention and feed before they are added to h; only some backends have them.
    attention_post: Norm | None = None
    feed_post: Norm | None = None
    beside: Beside | None = None  # with `feed_post`
    scale: float = 1.0  # of the layer's output; with `feed_post`

    @property
    def is_special(self) -> bool:
        """Whether it has more than attention with heads of one form, a feed-forward and residuals."""
        return self.gates is not None or self.attention_post is not None or self.feed_post is not None


@dataclass(frozen=True, slots=True)
class StreamedHandles:
    """The packed parts of a layer between hyper-connections, for `Ops.stack`."""

    attention_streams: Handle
    norm: Norm  # [D]
    first: Handle  # of the queries' latent, and of all that is kept of a token
    q_norm: Norm
    q: Handle  # [H d, …]
    index_q: Handle | None
    heads: Handle
    o_a: Sequence[Handle]  # of each group of heads
    o_b: Handle
    feed_streams: Handle
    feed_norm: Norm  # [D]
    feed: Handle
    chosen: Tensor | None  # [V, k] int64 experts of every token; None: the router chooses
    rate: int  # of its past
    row: int  # among the layers of this rate
    attention_sum: SharedSum | None = None  # as in `LayerHandles`
    feed_sum: SharedSum | None = None


def plain_layers(layers: Sequence[LayerHandles | StreamedHandles]) -> list[LayerHandles] | None:
    """The layers if all have one window and nothing but attention and a feed-forward; else None."""
    plain = [layer for layer in layers if isinstance(layer, LayerHandles) and not layer.is_special]
    return plain if len(plain) == len(layers) and len({layer.window for layer in plain}) <= 1 else None


class Ops(ABC):
    """A backend. Activations are `dtype` on `device`; a row stride larger than the width is allowed."""

    name: str  # for the log: "reference float32", "cpu/avx512_vnni, 2 threads"
    device: torch.device
    dtype: torch.dtype
    source: str = ""  # fingerprint of the packed checkpoint, set by `farthing.model.load`
    weight_files: tuple[Path, ...] = ()  # of the checkpoint, set by `farthing.model.load`
    packed_from: str | None = None  # fingerprint stored in the mapped packed file, if any
    sums_in_stack: bool = False  # whether `stack` supports sums over ranks
    cache_dtype: CacheDtype = "bfloat16"  # the default of cached latents: near that of the activations
    arrays: bool = False  # tensors are numpy arrays instead of torch's
    continues_states: bool = False  # whether `delta` knows `Batch.state_sources`
    routed_only: bool = False  # `pack_moe` skips shared experts, also those of a packed file

    def tensor(self, values: NDArray[Any]) -> Tensor:
        """The values on this backend's device; on the host without a copy."""
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def coarse(self) -> Self:
        """This backend for weights whose results are verified, such as drafts: rounded more coarsely if that
        makes them faster to read."""
        return self

    # -- packing: `name` identifies the weight in a packed file; the callable is not called if the file
    #    already has it.

    @abstractmethod
    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]], heads: int = 1) -> Handle:
        """Pack one projection from matrices [N_i, K] stacked along their rows.

        heads: of an o_proj [D, H v], whose columns tensor parallelism divides by them.
        """

    def pack_table(self, name: str, weight: Callable[[], Weight], head: Handle | None = None) -> Any:
        """The table [V, D] for `embed`; head: the packed head, if it has the same weights."""
        table = weight()
        if table.format == "dense":
            return table.data
        log.warning("%s is decoded from %s to %s", name, table.format, self.dtype)
        return table.dequantize(self.dtype)

    def pack_head(self, name: str, weight: Callable[[], Weight]) -> Handle:
        """Pack an output head [V, D], for `logits`, `top_logits` and `greedy`."""
        return self.pack_linear(name, lambda: [weight()])

    @abstractmethod
    def pack_mlp(
        self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]], activation: Gate = SILU
    ) -> Handle:
        """Pack a gated MLP: gate [I, D], up [I, D], down [D, I]."""

    @abstractmethod
    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Handle:
        """Pack a router, its experts and the shared expert."""

    @abstractmethod
    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Handle:
        """kv_b_proj [H (n + v), c] with the latent's norm weight [c]; rope [2, max_len, r/2] (cos, sin)."""

    @abstractmethod
    def pack_grouped(self, spec: GroupedSpec, parts: GroupedParts, rope: Tensor) -> Handle:
        """The heads of grouped-query attention; rope [2, max_len, rotated / 2] (cos, sin)."""

    @abstractmethod
    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> Handle:
        """Weight [d] and bias [d] of the index keys' LayerNorm; rope as in `pack_attention`."""

    @abstractmethod
    def pack_delta(self, name: str, spec: DeltaSpec, parts: Callable[[], DeltaParts]) -> Handle:
        """Gated DeltaNet's parameters that are no matrices."""

    def pack_compressed(
        self, name: str, spec: CompressedSpec, parts: Callable[[], CompressedParts], rope: Tensor
    ) -> Handle:
        """The heads of attention to a compressed past; rope [2, max_len, r / 2] (cos, sin)."""
        raise NotImplementedError(f"backend {self.name!r} has no compressed past")

    def pack_streams(
        self, name: str, spec: StreamSpec, hidden: int, parts: Callable[[], StreamParts]
    ) -> Handle:
        """The parameters of hyper-connections between streams of `hidden` columns."""
        raise NotImplementedError(f"backend {self.name!r} has no hyper-connections")

    def zeros(self, dtype: str, *shape: int) -> Tensor:
        """Zeros of a dtype by its name, for what a cache keeps."""
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def new_cache(
        self, layers: int, num_blocks: int, block_size: int, width: int, dtype: CacheDtype
    ) -> LatentCache:
        """An empty cache; width = c + r."""
        kind, shape = CACHE_DTYPES[dtype], (layers, num_blocks, block_size)
        scale = self.tensor(np.ones((*shape, 2), np.float32)) if kind in CACHE_MAX else None
        return LatentCache(self.zeros(kind, *shape, width), scale)

    # -- computing

    @abstractmethod
    def embed(self, ids: Tensor, table: Any) -> Tensor:
        """ids [T] int64, table [V, D] of `pack_table` -> [T, D]."""

    @abstractmethod
    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """x [T, K] / rms(x) * weight."""

    @abstractmethod
    def linear(
        self, x: Tensor, weight: Handle, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """[T, K] -> [T, N]: residual + rms_norm(x) W^T. The residual may be overwritten."""

    @abstractmethod
    def mla(self, q: Tensor, kv: Tensor, heads: Handle, place: Place, select: Tensor | None = None) -> Tensor:
        """q [T, H (n + r)], kv [T, c + r] (both before rotation, latent before its norm) -> [T, H v].

        Norms the latent, rotates, writes (latent, k_pe) to the batch's slots, then attends to cached tokens
        of each token's sequence: the first `position + 1`, or those at the positions select [T, K] int32
        (ascending, padded with -1, at least one, none after the token's own).
        """

    @abstractmethod
    def gqa(self, qkv: Tensor, heads: Handle, place: Place) -> Tensor:
        """qkv [T, (H + 2 G) d], and H d columns of gates -> [T, H d]; the layer has G cache rows.

        Adds biases, norms and rotates queries and keys, writes (value, key) to the batch's slots, then
        attends to the first `position + 1` cached tokens of each token's sequence, or the last `window` of
        those: what is before them is not read. qkv may be overwritten.
        """

    @abstractmethod
    def delta(self, x: Tensor, gates: Tensor, delta: Handle, place: Place) -> Tensor:
        """Gated DeltaNet: x [T, C + Hv dv] (queries, keys, values, output gates z), gates [T, 2 Hv] (b, a)
        -> [T, Hv dv].

        Queries, keys and values pass through the convolution and SiLU; queries and keys are L2-normed, the
        queries scaled by dk^-0.5. Every token then changes its head's state S, read from and written to the
        batch's state slots: S = decay S; S = S + k (sigmoid(b) (v - S^T k))^T; o = S^T q; the result is
        rms_norm(o) silu(z). A sequence whose first token of the step is at position 0 starts from zeros.
        """

    def compressed(self, q: Tensor, x: Tensor, index_q: Tensor | None, heads: Handle, place: Place) -> Tensor:
        """Attention to a window and a compressed past: q [T, H d] -> [T, H d].

        x [T, …]: the key d, values and gates of attention's pool, then of the indexer's, and its weights Hi,
        as far as the layer has them; index_q [T, Hi di]. Everything is given before norms and rotation.

        Norms every query without a weight, rotates queries and keys, writes the keys and the pooled columns
        to the cache, and an entry for every `rate` tokens that are complete. A token at position p attends to
        its window and to the first (p + 1) // rate entries, or the index.top_k of those with the largest
        scores (`index`). What the output has been rotated by as a value is undone.
        """
        raise NotImplementedError(f"backend {self.name!r} has no compressed past")

    def collapse(self, x: Tensor, streams: Handle) -> tuple[Tensor, Tensor]:
        """x [T, n D] -> the streams' weighted sum [T, D], and how `spread` mixes them [T, n (n + 1)]: empty
        where the streams end."""
        raise NotImplementedError(f"backend {self.name!r} has no residual of several streams")

    def spread(self, x: Tensor, y: Tensor, mix: Tensor, streams: Handle) -> Tensor:
        """x [T, n D], y [T, D] -> mixed streams of x, and y added to each with its own weight [T, n D]. x may
        be overwritten."""
        raise NotImplementedError(f"backend {self.name!r} has no residual of several streams")

    @abstractmethod
    def index(self, q: Tensor, k: Tensor, w: Tensor, indexer: Handle, place: Place) -> Tensor | None:
        """Select keys for `mla`: q [T, H d], k [T, d], w [T, H] -> positions [T, K] int32, ascending, padded
        with -1; None if no token has more than K cached.

        q and k are given before rotation, k before its LayerNorm; k is cached. The positions are those of
        the K largest sums over h of w ReLU(q . k); ties go to the earlier position.
        """

    @abstractmethod
    def mlp(self, x: Tensor, weights: Handle, norm: Norm, residual: bool = True) -> Tensor:
        """x + down(activation(gate(n), up(n))) with n = rms_norm(x); without x if `residual` is False.

        x may be overwritten if it is added.
        """

    @abstractmethod
    def moe(
        self, x: Tensor, weights: Handle, norm: Norm, counts: Tensor | None = None, residual: bool = True,
        chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x + sum of weighted experts(n) + shared(n), which its gate may scale, n = rms_norm(x); without x if
        `residual` is False.

        x may be overwritten if it is added.

        counts [E] int64, if given, is increased by the tokens per expert. chosen [T, k] int64: the experts of
        each token, which the router only weighs; None: it chooses them.
        """

    @abstractmethod
    def reroute(self, weights: Handle, spec: RouterSpec) -> None:
        """Change the routing rule of a packed mixture of experts without repacking the experts."""

    @abstractmethod
    def route(self, n: Tensor, weights: Handle) -> tuple[Tensor, Tensor]:
        """n [T, D] -> (ids [T, k] int64, weights [T, k] float32); skipped experts have id -1, weight 0."""

    def stack(
        self, layers: Sequence[LayerHandles | StreamedHandles], ending: Handle | None = None
    ) -> Handle | None:
        """Layers that `run_stack` computes in one call; None if the backend does not support them.

        ending: the streams' last sum after layers between hyper-connections; None on a stage before the last.
        With ranks (`sums_in_stack`), the outputs of attention or feed-forward are summed over ranks.
        """
        return None

    def run_stack(
        self, h: Tensor, stack: Handle, batch: Batch, cache: LatentCache, counts: Tensor | None,
        span: slice = ALL,
    ) -> Tensor:  # fmt: skip
        """h [T, D] through the layers `span` of a stack, and of the cache; counts [L, E] as in `moe`.

        Raises PeerLost if a rank of a sum has exited.
        """
        raise NotImplementedError(f"backend {self.name!r} has no stack")

    @abstractmethod
    def logits(self, x: Tensor, head: Handle, norm: Norm) -> Tensor:
        """x [T, D] -> [T, V] float32."""

    @abstractmethod
    def top_logits(self, x: Tensor, head: Handle, norm: Norm, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest logits, all of them if k exceeds V: (values [T, k] float32, ids [T, k] int64,
        logsumexp of all [T] float32).

        Equal values are ordered by the smaller id.
        """

    def greedy(self, x: Tensor, head: Handle, norm: Norm) -> list[int]:
        """The most likely token per row of x [T, D]; ties go to the lowest id. Raises NotFinite."""
        _, ids, total = self.top_logits(x, head, norm, 1)
        require_finite(total[:, None])
        return ids[:, 0].tolist()  # type: ignore[no-any-return]

    def sample(self, logits: Tensor, uniform: Tensor, filters: Filters | None = None) -> Tensor:
        """Sample one token per row: logits [n, V] float32, divided by the temperature; uniform [n] float64 in
        (0, 1) -> [n] int64, where the cumulative probability exceeds uniform: over the vocabulary in order of
        id, or over the tokens kept by the filters, most likely first. A row's token does not depend on other
        rows."""
        return sample(logits, uniform, filters)

    def forget(self, prefix: str) -> None:  # noqa: B027  (most backends keep no weights by name)
        """Allow repacking of weights whose names begin with `prefix`."""

    def check_placement(self) -> None:  # noqa: B027  (only backends that bind weights to memory nodes)
        """Log whether a loaded model's weights are in the memory nodes that read them. The thread that loaded
        them may use all of its CPUs again."""

    def save_packed(self, path: str) -> None:
        """Write packed weights to one file for `select(…, packed=path)`; ValueError if unsupported."""
        raise ValueError(f"backend {self.name!r} has no packed format; use backend 'cpu'")


class HostOps(Ops):
    """A CPU backend that can compute experts for another device (`farthing.ops.hybrid`)."""

    @abstractmethod
    def moe_chosen(self, x: Tensor, weights: Handle, norm: Norm, ids: Tensor, gates: Tensor) -> Tensor:
        """`moe` with given routing: ids [T, k] int64, -1 for none, and gates [T, k] float32."""
