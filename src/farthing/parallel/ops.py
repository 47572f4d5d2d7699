"""A backend with weights sharded over ranks: the same signatures, with the collectives inside.

The model code is the same for every layout. Tensor parallelism adds a sum after each row-parallel product
(o_proj, down_proj). Expert parallelism adds a sum over the stage. The vocabulary, sharded over all stages,
adds a sum of embeddings and a gather of the head's logits, or of only the largest ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.api import Handle, LayerHandles, Norm, Ops, Place, StreamedHandles
from farthing.ops.hybrid import OpsWrapper, forwarded, shared_output
from farthing.ops.reference import identity_weight, largest
from farthing.ops.specs import GroupedParts, GroupedSpec, MoEWeights, RouterSpec
from farthing.parallel.collectives import Group
from farthing.parallel.shared import SharedGroup

Shares = Callable[[str], dict[tuple[int, int], tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one rank."""

    tp: Group  # heads, dense and shared experts
    experts: Group  # the group that sums the outputs of a mixture of experts
    vocabulary: Group  # embedding and head
    rows: tuple[int, ...]  # vocabulary: first row of each rank's slice, and the end
    dispatch: bool = False  # ranks of `experts` have different tokens, sent to their experts

    @property
    def first_row(self) -> int:
        """First vocabulary row of this rank's slice."""
        return self.rows[self.vocabulary.index]


@dataclass(slots=True)
class Experts:
    """A layer's experts on this rank, by share of the rows (see `Placement.shares`)."""

    parts: dict[tuple[int, int], Handle]
    shared: Handle | None  # separate if no part takes every row
    shared_gate: Tensor | None
    spec: RouterSpec  # of the whole layer


@dataclass(frozen=True, slots=True)
class WholeNorm:
    """This rank's heads, whose queries are normed together with those of all ranks, as are the keys."""

    heads: Handle  # of `inner`, which norms nothing
    bias: Tensor | None
    norms: tuple[Tensor, Tensor]  # weights, of this rank's queries and keys
    eps: float


class ParallelOps(OpsWrapper):
    """`inner` on this rank's slices. shares: local experts by the name of the mixture of experts."""

    def __init__(self, inner: Ops, groups: Groups, shares: Shares) -> None:
        name = f"{inner.name}, tp {groups.tp.size}, experts over {groups.experts.size}"
        super().__init__(inner, name)
        self._groups, self._shares = groups, shares
        self._tp, self._experts = groups.tp, groups.experts

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Experts:
        """Pack copied experts separately from those that take every row."""
        shares = self._shares(name)
        if set(shares) <= {(1, 0)} and not self._groups.dispatch:
            return Experts({(1, 0): self._inner.pack_moe(name, self._local(spec), weights)}, None, None, spec)
        w = weights()
        parts = {
            share: self._inner.pack_moe(
                f"{name}.share{share[0]}.{share[1]}", self._local(spec, share), _only(w, experts)
            )
            for share, experts in shares.items()
        }
        load = w.shared
        shared = load and self._inner.pack_mlp(f"{name}.shared_experts", load, spec.gate)
        return Experts(parts, shared, w.shared_gate, spec)

    def pack_grouped(self, spec: GroupedSpec, parts: GroupedParts, rope: Tensor) -> Handle:
        if not spec.whole_norm or self._tp.size == 1:
            return self._inner.pack_grouped(spec, parts, rope)
        assert parts.q_norm is not None and parts.k_norm is not None
        rest = GroupedParts(None, None, None, parts.sinks)
        heads = self._inner.pack_grouped(replace(spec, whole_norm=False), rest, rope)
        bias = None if parts.bias is None else parts.bias.to(self.device)
        norms = parts.q_norm.to(self.device), parts.k_norm.to(self.device)
        return WholeNorm(heads, bias, norms, spec.norm_eps)

    def gqa(self, qkv: Tensor, heads: Handle, place: Place) -> Tensor:
        """Norms over the heads of all ranks take a sum of squares; ranks that share keys count them alike."""
        if not isinstance(heads, WholeNorm):
            return self._inner.gqa(qkv, heads, place)
        if heads.bias is not None:
            qkv = qkv + heads.bias.to(qkv.dtype)
        queries, keys = map(len, heads.norms)
        parts = qkv[:, :queries], qkv[:, queries : queries + keys]
        squares = self._tp.all_reduce(torch.stack([x.float().square().sum(-1) for x in parts]))
        for x, norm, total in zip(parts, heads.norms, squares, strict=True):
            mean = total / (len(norm) * self._tp.size)
            x.copy_(x.float() * (mean + heads.eps).rsqrt().unsqueeze(1) * norm)
        return self._inner.gqa(qkv, heads.heads, place)

    def _local(self, spec: RouterSpec, share: tuple[int, int] = (1, 0)) -> RouterSpec:
        """The routing rule of one part. One rank adds the identities; none does if rows are dispatched."""
        adds = self._experts.index == 0 and share == (1, 0) and not self._groups.dispatch
        return spec if adds else replace(spec, identities=0)

    def stack(
        self, layers: Sequence[LayerHandles | StreamedHandles], ending: Handle | None = None
    ) -> Handle | None:
        if any(isinstance(layer.heads, WholeNorm) for layer in layers):
            return None
        local = self._local_layers(layers)
        return None if local is None else self._inner.stack(local, ending)

    def _local_layers(
        self, layers: Sequence[LayerHandles | StreamedHandles]
    ) -> list[LayerHandles | StreamedHandles] | None:
        """Layers of the inner backend, if this is the only rank or the backend can synchronize ranks, and
        experts are one part."""
        groups = (self._tp, self._experts)
        alone = all(g.size == 1 for g in groups)
        meets = self._inner.sums_in_stack and all(g.size == 1 or isinstance(g, SharedGroup) for g in groups)
        if self._groups.dispatch or not (alone or meets):
            return None
        attention, experts = (g.shared_sum() if isinstance(g, SharedGroup) else None for g in groups)
        local: list[LayerHandles | StreamedHandles] = []
        for layer in layers:
            feed, over = layer.feed, attention
            if isinstance(feed, Experts):
                if set(feed.parts) != {(1, 0)} or feed.shared is not None:
                    return None
                feed, over = feed.parts[1, 0], experts
            local.append(replace(layer, feed=feed, attention_sum=attention, feed_sum=over))
        return local

    run_stack = forwarded(Ops.run_stack)

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        if self._groups.vocabulary.size == 1:
            return self._inner.embed(ids, table)
        local = ids - self._groups.first_row
        here = (local >= 0) & (local < table.shape[0])
        rows = self._inner.embed(local.where(here, 0), table)
        return self._groups.vocabulary.all_reduce(rows.masked_fill(~here.unsqueeze(1), 0))

    def linear(
        self, x: Tensor, weight: Handle, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """A product with a residual is row-parallel: its input is this rank's heads."""
        if residual is None or self._tp.size == 1:
            return self._inner.linear(x, weight, norm, residual)
        return residual + self._tp.all_reduce(self._inner.linear(x, weight, norm))

    def mlp(self, x: Tensor, weights: Handle, norm: Norm, residual: bool = True) -> Tensor:
        if self._tp.size == 1:
            return self._inner.mlp(x, weights, norm, residual)
        total = self._tp.all_reduce(self._inner.mlp(x, weights, norm, residual=False))
        return x + total if residual else total

    def moe(
        self, x: Tensor, weights: Experts, norm: Norm, counts: Tensor | None = None, residual: bool = True,
        chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        whole = weights.parts.get((1, 0))
        if self._experts.size == 1 and whole is not None and not self._groups.dispatch:
            return self._inner.moe(x, whole, norm, counts, residual, chosen)
        if self._groups.dispatch and chosen is not None:
            raise ValueError("dp_attention: got True; expected False: tokens choose experts of this model")
        if self._groups.dispatch:
            total = self._moe_dispatched(x, weights, norm, counts)
        else:
            total = self._moe_summed(x, weights, norm, counts, chosen)
        return x + total if residual else total

    def _moe_summed(
        self, x: Tensor, weights: Experts, norm: Norm, counts: Tensor | None, chosen: Tensor | None
    ) -> Tensor:
        """Each rank computes its experts for every row; the results are summed over ranks."""
        whole = weights.parts.get((1, 0))
        total = torch.zeros_like(x)
        for (m, j), part in weights.parts.items():
            rows = x[j::m]
            if len(rows):
                counted = counts if part is whole else None
                picked = None if chosen is None else chosen[j::m]
                total[j::m] += self._inner.moe(rows, part, norm, counted, False, picked)
        if weights.shared is not None:
            total += shared_output(self._inner, x, weights.shared, weights.shared_gate, norm, False)
        if whole is None and self._experts.index == 0 and weights.spec.identities:
            n = self._inner.rms_norm(x, norm)
            total += _identities(n, *self.route(n, weights), weights.spec)
        if whole is None and counts is not None:
            self._count(x, next(iter(weights.parts.values())), norm, counts)
        return self._experts.all_reduce(total)

    def _moe_dispatched(self, x: Tensor, weights: Experts, norm: Norm, counts: Tensor | None) -> Tensor:
        """Dispatch and combine: each token is sent once to each rank that holds one of its experts.

        The tp ranks of a copy have the same tokens; each sends its share.
        """
        part = weights.parts[(1, 0)]
        total = torch.zeros_like(x)
        mine = slice(self._tp.index, None, self._tp.size)
        rows = x[mine].contiguous()
        n = self._inner.rms_norm(rows, norm)
        ids, gates = self._inner.route(n, part)
        if counts is not None:
            counts += torch.bincount(ids[ids >= 0], minlength=len(counts))
        routed = weights.spec.num_experts - weights.spec.identities
        owner = torch.where((ids >= 0) & (ids < routed), ids // (routed // self._experts.size), -1)
        sent = [(owner == r).any(1).nonzero()[:, 0] for r in range(self._experts.size)]
        received = self._experts.all_to_all([rows[chosen] for chosen in sent])
        sizes = [len(r) for r in received]
        here = torch.cat(received)
        if len(here):
            here = self._inner.moe(here, part, norm, residual=False)
        summed = _identities(n, ids, gates, weights.spec)
        for chosen, partial in zip(sent, self._experts.all_to_all(here.split(sizes)), strict=True):
            summed.index_add_(0, chosen, partial)
        total[mine] = summed
        if weights.shared is not None:
            total += shared_output(self._inner, x, weights.shared, weights.shared_gate, norm, False)
        return self._tp.all_reduce(total) if self._tp.size > 1 else total

    def reroute(self, weights: Experts, spec: RouterSpec) -> None:
        weights.spec = spec
        for share, part in weights.parts.items():
            self._inner.reroute(part, self._local(spec, share))

    def route(self, n: Tensor, weights: Experts) -> tuple[Tensor, Tensor]:
        return self._inner.route(n, next(iter(weights.parts.values())))

    def logits(self, x: Tensor, head: Handle, norm: Norm) -> Tensor:
        """Gather slices of unequal width by padding them."""
        group, rows = self._groups.vocabulary, self._groups.rows
        own = self._inner.logits(x, head, norm)
        if group.size == 1:
            return own
        widths = [stop - start for start, stop in itertools.pairwise(rows)]
        parts = group.all_gather(F.pad(own, (0, max(widths) - own.shape[1])))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], -1)

    def top_logits(self, x: Tensor, head: Handle, norm: Norm, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Merge each slice's top k: sends k values per rank instead of the whole vocabulary."""
        group, rows = self._groups.vocabulary, self._groups.rows
        if group.size == 1:
            return self._inner.top_logits(x, head, norm, k)
        if k > min(stop - start for start, stop in itertools.pairwise(rows)):
            return largest(self.logits(x, head, norm), k)
        values, ids, total = self._inner.top_logits(x, head, norm, k)
        # Slices are in order of token id, so a stable sort keeps equal logits in that order.
        values = torch.cat(group.all_gather(values), -1)
        ids = torch.cat(group.all_gather(ids + self._groups.first_row), -1)
        values, order = values.sort(stable=True, dim=-1, descending=True)
        return (
            values[:, :k],
            ids.gather(1, order[:, :k]),
            torch.stack(group.all_gather(total), -1).logsumexp(-1),
        )

    def _count(self, x: Tensor, part: Handle, norm: Norm, counts: Tensor) -> None:
        """Count tokens per expert when no part sees every row."""
        ids, _ = self._inner.route(self._inner.rms_norm(x, norm), part)
        counts += torch.bincount(ids[ids >= 0], minlength=len(counts))


def _identities(n: Tensor, ids: Tensor, gates: Tensor, spec: RouterSpec) -> Tensor:
    """The contribution of identity experts to rows of the normed input n [T, D]."""
    return (n.float() * identity_weight(ids, gates, spec)).to(n.dtype)


def _only(w: MoEWeights, experts: Sequence[int]) -> Callable[[], MoEWeights]:
    kept = set(experts)
    return lambda: replace(
        w,
        experts=[load if e in kept else None for e, load in enumerate(w.experts)],
        shared=None,
        shared_gate=None,
    )
