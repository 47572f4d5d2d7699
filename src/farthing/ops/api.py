"""The arithmetic the model is written in: one signature an op, one implementation a device.

`farthing.ops.reference` defines what is correct; every other backend is held against it.

Legend: T tokens of the step, sorted by sequence; B sequences; D hidden size; H heads; n, r, v the
nope, rotary and value head sizes; c the KV latent; E routed experts; k experts a token; V vocabulary;
L cache layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from farthing.ops.sampling import Filters, sample
from farthing.ops.weights import Weight

Handle = Any  # what a backend packs a weight into; opaque to everyone else
CacheDtype = Literal["float32", "bfloat16", "fp8", "int8"]


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How experts are chosen (DeepSeek-V3 section 2.1.2; V2 section 2.1.3)."""

    num_experts: int
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    group_score: Literal["top2_sum", "max"] = "top2_sum"  # noaux_tc | group_limited_greedy
    normalize: bool = True
    scale: float = 1.0
    # Adaptive experts: the smallest number in [min_experts, top_k] whose normalized weights reach `mass`.
    mass: float | None = None
    min_experts: int = 2


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Head layout of multi-head latent attention (DeepSeek-V2 section 2.1)."""

    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_dim: int
    scale: float  # of the scores, YaRN's factor included
    interleaved: bool = True  # rotary pairs are (x0, x1), (x2, x3), … and not (x_i, x_{i + r/2})


@dataclass(frozen=True, slots=True)
class IndexerSpec:
    """Layout of the lightning indexer, which chooses what attention reads (DeepSeek-V3.2-Exp section 2.1)."""

    num_heads: int
    head_dim: int
    rope_dim: int  # of head_dim, from the first on
    top_k: int
    interleaved: bool = False
    norm_eps: float = 1e-6  # of the keys' LayerNorm


@dataclass(frozen=True, slots=True)
class MoEWeights:
    """What `pack_moe` packs. The experts come one at a time, so that they need not all be in memory."""

    gate: Tensor  # [E, D] float32
    bias: Tensor | None  # [E] float32, e_score_correction_bias
    # gate [I, D], up [I, D], down [D, I] of each; None: on another rank, its tokens are left out here
    experts: Sequence[Callable[[], tuple[Weight, Weight, Weight]] | None]
    shared: Callable[[], tuple[Weight, Weight, Weight]] | None


@dataclass(slots=True)
class IndexCache:
    """The index keys of every cached token, in the blocks of the latent cache they belong to."""

    data: Tensor  # [rows, num_blocks, block_size, d]: one row per layer that has an indexer
    scale: Tensor | None  # [rows, num_blocks, block_size] float32 for fp8 and int8


@dataclass(slots=True)
class LatentCache:
    """The paged cache: (latent, rotated key) of every token, c + r numbers a token a layer.

    A block is the same index in every layer. Slot = block * block_size + offset.
    """

    data: Tensor  # [L, num_blocks, block_size, c + r], float32 | bfloat16 | float8_e4m3fn | int8
    scale: Tensor | None  # [L, num_blocks, block_size, 2] float32 (latent, rotary) for fp8 and int8
    index: IndexCache | None = None  # of models with sparse attention

    def tensors(self) -> list[Tensor]:
        """All that is cached, each tensor [*, num_blocks, …]: a block is its slice along dimension 1."""
        kept = [self.data, self.scale]
        if self.index is not None:
            kept += [self.index.data, self.index.scale]
        return [t for t in kept if t is not None]

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.data.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.data.shape[2]


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the tokens of one step stand. All tensors are contiguous."""

    positions: Tensor  # [T] int32, position of each token in its sequence
    slots: Tensor  # [T] int64, where its key goes in the cache
    query_start: Tensor  # [B + 1] int32, tokens of sequence b: query_start[b] … query_start[b + 1]
    context_lens: Tensor  # [B] int32, tokens of the sequence in the cache after this step
    block_table: Tensor  # [B, max_blocks] int32, blocks of each sequence in order


class NotFinite(ArithmeticError):
    """Logits that are NaN or infinite: the weights are broken, or the model overflows its activation type."""


class PeerLost(RuntimeError):
    """Another rank has ended, or did not come to a collective in time."""


@dataclass(frozen=True, slots=True)
class SharedSum:
    """Where ranks of one host meet to add, as addresses for native code (`farthing.parallel.shared`)."""

    counters: int  # of rank 0; the others' a cache line apart
    slots: int  # two a rank
    slot_bytes: int
    step: int  # of this rank: collectives begun
    failed: int  # a word that is not zero once a rank has ended
    size: int
    index: int
    parent: int  # the process whose end is this one's too, 0 for none
    crowded: bool  # more ranks than cores
    timeout: float  # seconds


@dataclass(frozen=True, slots=True)
class LayerHandles:
    """What one layer packed, for `Ops.stack`: h + attention(norm(h)), then h + feed(feed_norm(h))."""

    norm: Tensor  # [D]
    qkv_a: Handle  # [q + c + r, D]
    q_width: int  # columns of qkv_a's output that are the query, or its latent
    q_norm: Tensor | None  # [q]; None with q_b
    q_b: Handle | None  # None: qkv_a gives the query itself
    heads: Handle
    o: Handle
    feed_norm: Tensor  # [D]
    feed: Handle
    attention_sum: SharedSum | None = None  # over the ranks that share the heads; None: all are here
    feed_sum: SharedSum | None = None


class Ops(ABC):
    """A backend. Activations are `dtype` on `device`; a row stride larger than the width is allowed."""

    name: str  # for the log: "reference float32", "cpu/avx512_vnni, 2 threads"
    device: torch.device
    dtype: torch.dtype
    source: str = ""  # fingerprint of the checkpoint that is packed; `farthing.model.load` sets it
    packed_from: str | None = None  # the fingerprint a mapped packed file names, where one is mapped
    sums_in_stack: bool = False  # whether `stack` takes layers that are summed over ranks
    routed_only: bool = False  # `pack_moe` leaves out shared experts, a packed file's too

    def coarse(self) -> Self:
        """This backend for weights whose results are checked by others, such as drafts: rounded further where
        that makes them faster to read."""
        return self

    @property
    def cache_dtype(self) -> CacheDtype:
        """What an engine keeps latents in when it is not told: the type of the activations."""
        return "float32" if self.dtype is torch.float32 else "bfloat16"

    # -- packing: `name` identifies the weight in a packed file; the callable is not called when the
    #    backend already has it there.

    @abstractmethod
    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]]) -> Handle:
        """One projection from matrices [N_i, K] stacked along their rows."""

    @abstractmethod
    def pack_mlp(self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]]) -> Handle:
        """A gated MLP: gate [I, D], up [I, D], down [D, I]."""

    @abstractmethod
    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Handle:
        """A router, its experts and the shared expert."""

    @abstractmethod
    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Handle:
        """kv_b_proj [H (n + v), c] with the latent's norm weight [c]; rope [2, max_len, r/2] (cos, sin)."""

    @abstractmethod
    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> Handle:
        """Weight [d] and bias [d] of the index keys' LayerNorm; rope as in `pack_attention`."""

    @abstractmethod
    def new_cache(
        self, layers: int, num_blocks: int, block_size: int, width: int, dtype: CacheDtype
    ) -> LatentCache:
        """An empty cache; width = c + r."""

    def new_index_cache(self, like: LatentCache, rows: int, width: int) -> IndexCache:
        """Empty index keys for the blocks of a latent cache, in its dtype; width = d."""
        blocks, device = like.data.shape[1:3], like.data.device
        scale = None if like.scale is None else torch.ones(rows, *blocks, device=device)
        return IndexCache(torch.zeros(rows, *blocks, width, dtype=like.data.dtype, device=device), scale)

    # -- computing

    @abstractmethod
    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """ids [T] int64, table [V, D] -> [T, D]."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, K] / rms(x) * weight [K]."""

    @abstractmethod
    def linear(
        self,
        x: Tensor,
        weight: Handle,
        norm: Tensor | None = None,
        eps: float = 1e-6,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[T, K] -> [T, N]: residual + rms_norm(x) W^T. The residual may be overwritten."""

    @abstractmethod
    def mla(
        self,
        q: Tensor,
        kv: Tensor,
        attention: Handle,
        cache: LatentCache,
        layer: int,
        batch: Batch,
        eps: float,
        select: Tensor | None = None,
    ) -> Tensor:
        """q [T, H (n + r)], kv [T, c + r] (both before rotation, latent before its norm) -> [T, H v].

        Norms the latent, rotates, writes (latent, k_pe) to `batch.slots` of cache layer `layer`, then
        attends to cached tokens of each token's sequence: to the first `position + 1`, or to those at the
        positions select [T, K] int32, ascending and then -1, at least one and none beyond the token's own.
        """

    @abstractmethod
    def index(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        indexer: Handle,
        cache: LatentCache,
        row: int,
        batch: Batch,
    ) -> Tensor | None:
        """What `mla` shall attend to: q [T, H d], k [T, d], w [T, H] -> positions [T, K] int32, ascending and
        then -1; None where no token has more than K cached.

        q and k are given before rotation, k before its LayerNorm; k is cached in `cache.index` row `row`. The
        positions are those of the K largest sums over h of w ReLU(q . k), the earlier of equal ones.
        """

    @abstractmethod
    def mlp(self, x: Tensor, weights: Handle, norm: Tensor, eps: float) -> Tensor:
        """x + down(silu(gate(n)) * up(n)) with n = rms_norm(x). x may be overwritten."""

    @abstractmethod
    def moe(
        self,
        x: Tensor,
        weights: Handle,
        norm: Tensor,
        eps: float,
        counts: Tensor | None = None,
        residual: bool = True,
    ) -> Tensor:
        """x + sum of weighted experts(n) + shared(n), n = rms_norm(x); without x where `residual` is False.

        x may be overwritten where it is added.

        counts [E] int64, if given, is increased by the tokens each expert saw.
        """

    @abstractmethod
    def reroute(self, weights: Handle, spec: RouterSpec) -> None:
        """Change the rule of a packed mixture of experts; the experts stay as they are."""

    @abstractmethod
    def route(self, n: Tensor, weights: Handle) -> tuple[Tensor, Tensor]:
        """n [T, D] -> (ids [T, k] int64, weights [T, k] float32); skipped experts have id -1, weight 0."""

    def stack(self, layers: Sequence[LayerHandles]) -> Handle | None:
        """Layers that `run_stack` computes in one call; None where the backend knows no such call.

        Over ranks (`sums_in_stack`) a sum runs over what attention, or the feed, adds to h on each of them.
        """
        return None

    def run_stack(
        self, h: Tensor, stack: Handle, batch: Batch, cache: LatentCache, eps: float, counts: Tensor | None
    ) -> Tensor:
        """h [T, D] through every layer of a stack, cache layers from 0 on; counts [L, E] as in `moe`.

        Raises PeerLost where a rank of a sum has gone.
        """
        raise NotImplementedError(f"backend {self.name!r} has no stack")

    @abstractmethod
    def logits(self, x: Tensor, head: Handle, norm: Tensor, eps: float) -> Tensor:
        """x [T, D] -> [T, V] float32."""

    @abstractmethod
    def top_logits(
        self, x: Tensor, head: Handle, norm: Tensor, eps: float, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest logits: (values [T, k] float32, ids [T, k] int64, logsumexp of all [T] float32).

        Equal values are ordered by the smaller id.
        """

    def greedy(self, x: Tensor, head: Handle, norm: Tensor, eps: float) -> list[int]:
        """The likeliest token of each row of x [T, D]; the lowest id of equal ones."""
        return self.top_logits(x, head, norm, eps, 1)[1][:, 0].tolist()  # type: ignore[no-any-return]

    def softmax(self, x: Tensor) -> Tensor:
        """Softmax over the last dimension of a float32 [T, N]. Optional: only benchmarks call it."""
        return x.softmax(-1)

    def sample(self, logits: Tensor, uniform: Tensor, filters: Filters | None = None) -> Tensor:
        """A token a row: logits [n, V] float32, divided by the temperature; uniform [n] float64 in (0, 1) ->
        [n] int64, where the running sum of the probabilities passes uniform: over the vocabulary in the order
        of its ids, or over the tokens that the filters leave, likeliest first. A row's token does not depend
        on the other rows."""
        return sample(logits, uniform, filters)

    def forget(self, prefix: str) -> None:  # noqa: B027  (most backends keep no weights by name)
        """Weights packed under names that begin with `prefix` may be packed again."""

    def verify_packed(self) -> None:  # noqa: B027  (only backends that map packed files have some)
        """Compare every checksum of a mapped packed file. Raises ValueError that names what differs."""

    def save_packed(self, path: str) -> None:
        """Write what was packed to one file for `select(…, packed=path)`; ValueError without a format."""
        raise ValueError(f"backend {self.name!r} has no packed format; use backend 'cpu'")


class HostOps(Ops):
    """A backend of the CPU that can compute experts for another device (`farthing.ops.hybrid`)."""

    @abstractmethod
    def moe_chosen(
        self, x: Tensor, weights: Handle, norm: Tensor, eps: float, ids: Tensor, gates: Tensor
    ) -> Tensor:
        """`moe` with the choice made elsewhere: ids [T, k] int64, -1 for none, and gates [T, k] float32."""
