"""The shard plan: ranks, the slice of each tensor every rank reads, experts' places and micro-batches.

Legend: tp tensor-parallel ranks (heads, dense and shared experts); ep expert-parallel ranks (whole
experts); pp pipeline stages (layer ranges). A stage has max(tp, ep) ranks; with ep > tp, ep / tp copies of
tp ranks hold the same slices of everything except the routed experts. The vocabulary is sharded over the
tp x pp ranks of a copy: embedding and head are as large as many layers, so a stage with all of them would
be the largest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import prod

from farthing.cpus import own_cpus
from farthing.lazy import torch
from farthing.model import ModelConfig, Parameters, each_kind, layer_of
from farthing.model.spec import Tensor
from farthing.ops import Batch, Blocks, Cut


@dataclass(frozen=True, slots=True)
class Placement:
    """The experts of one layer on each rank of a stage, in ascending order.

    Greedy EPLB (DeepSeek 2025): the expert with the most tokens per copy gets the next copy. Copies are then
    assigned, heaviest first, to the least loaded rank that has room and does not hold that expert. Integers
    only, no torch.
    """

    ranks: tuple[tuple[int, ...], ...]

    def shares(self, rank: int) -> dict[tuple[int, int], tuple[int, ...]]:
        """A rank's experts by share (m, j): of m copies, this one computes rows t with t mod m = j."""
        shares: dict[tuple[int, int], list[int]] = {}
        for expert in self.ranks[rank]:
            holders = [r for r, experts in enumerate(self.ranks) if expert in experts]
            shares.setdefault((len(holders), holders.index(rank)), []).append(expert)
        return {share: tuple(experts) for share, experts in sorted(shares.items())}

    def loads(self, tokens: Sequence[int]) -> list[float]:
        """Tokens per rank, if every expert's tokens are spread evenly over its copies."""
        copies = [sum(e in rank for rank in self.ranks) for e in range(len(tokens))]
        return [sum(tokens[e] / copies[e] for e in rank) for rank in self.ranks]


Placements = dict[int, Placement]  # by checkpoint layer; missing layers use contiguous ranges


def in_order(experts: int, ranks: int) -> Placement:
    """Equal contiguous ranges of experts: the initial placement."""
    each = experts // ranks
    return Placement(tuple(tuple(range(r * each, (r + 1) * each)) for r in range(ranks)))


def place(tokens: Sequence[int], ranks: int, redundant: int = 0) -> Placement:
    """Place len(tokens) experts plus `redundant` copies, with the same number of experts on every rank.

    tokens: measured tokens per expert. Raises ValueError if the numbers do not divide or a copy cannot be
    placed.
    """
    experts = len(tokens)
    slots, rest = divmod(experts + redundant, ranks)
    if rest:
        raise ValueError(
            f"{experts} experts and {redundant} redundant copies do not divide evenly over {ranks} ranks; "
            f"expected a multiple in total, such as redundant = {redundant + ranks - rest}"
        )
    if redundant < 0 or slots > experts:
        raise ValueError(
            f"redundant: got {redundant}; expected 0…{experts * (ranks - 1)}, at most one copy per rank"
        )
    copies = [1] * experts
    for _ in range(redundant):
        hottest = max(
            (e for e in range(experts) if copies[e] < ranks), key=lambda e: (tokens[e] / copies[e], -e)
        )
        copies[hottest] += 1
    return Placement(_pack([t / c for t, c in zip(tokens, copies, strict=True)], copies, ranks, slots))


def _pack(
    load: Sequence[float], copies: Sequence[int], ranks: int, slots: int
) -> tuple[tuple[int, ...], ...]:
    """Longest processing time first. Ties go to experts with more copies, which need more ranks."""
    placed: list[set[int]] = [set() for _ in range(ranks)]
    total = [0.0] * ranks
    # Experts on every rank have no choice; the others are placed by load.
    order = sorted(range(len(load)), key=lambda e: (copies[e] < ranks, -load[e], e))
    for expert in order:
        open_ranks = sorted((r for r in range(ranks) if len(placed[r]) < slots), key=lambda r: (total[r], r))
        chosen = open_ranks[: copies[expert]]
        for rank in chosen:
            placed[rank].add(expert)
            total[rank] += load[expert]
        for _ in range(copies[expert] - len(chosen)):
            _make_room(placed, total, load, expert, slots)
    return tuple(tuple(sorted(experts)) for experts in placed)


def _make_room(
    placed: list[set[int]], total: list[float], load: Sequence[float], expert: int, slots: int
) -> None:
    """If only ranks that already have the expert have room, move another rank's expert there."""
    spare = next(r for r, experts in enumerate(placed) if len(experts) < slots)
    giver, moved = min(
        (
            (r, e)
            for r, experts in enumerate(placed)
            if expert not in experts
            for e in experts
            if e not in placed[spare]
        ),
        key=lambda pair: (total[pair[0]], load[pair[1]], pair),
    )
    placed[giver].remove(moved)
    placed[spare].add(moved)
    placed[giver].add(expert)
    total[spare] += load[moved]
    total[giver] += load[expert] - load[moved]


# Micro-batches of a step, so that pipeline stages work in parallel.

MICRO_ROWS = 64  # smaller micro-batches are bound by reading weights, larger ones by arithmetic


def threads_of_rank(chosen: int | None, neighbours: int) -> int:
    """Threads of each of the ranks on one host: so many as chosen, or a share of its cores."""
    return chosen or own_cpus().threads(neighbours)


def micro_batches(batch: Batch, most: int) -> list[tuple[slice, Batch]]:
    """Split into at most `most` runs of consecutive rows, each a batch of at least MICRO_ROWS.

    A run may end inside a sequence; the next run reads its keys from the cache.
    """
    tokens = len(batch.positions)
    count = max(1, min(most, tokens // MICRO_ROWS))
    if count == 1:
        return [(slice(0, tokens), batch)]
    edges = [tokens * i // count for i in range(count + 1)]
    return [(slice(a, b), rows_of(batch, a, b)) for a, b in itertools.pairwise(edges)]


def own_sequences(batch: Batch, copies: int, copy: int) -> tuple[torch.Tensor, Batch]:
    """(rows, batch) of the sequences assigned to one of `copies` groups of ranks.

    A sequence is assigned by its first block, which does not change while it runs. A group without sequences
    computes the first row and discards the result, because every group takes part in every layer.
    """
    starts = batch.query_start.tolist()
    lengths = batch.query_start[1:] - batch.query_start[:-1]
    own = (batch.block_table[:, 0] % copies == copy).nonzero()[:, 0]
    if not len(own):
        return torch.zeros(0, dtype=torch.int64), rows_of(batch, 0, 1)
    rows = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in own.tolist()])
    first = torch.zeros(1, dtype=torch.int32)
    return rows, Batch(
        positions=batch.positions[rows].contiguous(),
        slots=batch.slots[rows].contiguous(),
        query_start=torch.cat((first, lengths[own].cumsum(0).to(torch.int32))),
        context_lens=batch.context_lens[own].contiguous(),
        block_table=batch.block_table[own].contiguous(),
        state_slots=None if batch.state_slots is None else batch.state_slots[own].contiguous(),
        state_sources=None if batch.state_sources is None else batch.state_sources[own].contiguous(),
        windows=_windows(batch, rows, own),
        ids=None if batch.ids is None else batch.ids[rows],
    )


def _windows(batch: Batch, rows: torch.Tensor | slice, held: torch.Tensor) -> dict[int, Blocks]:
    """Those of some rows and sequences; rows, held: their indices."""
    return {
        window: Blocks(own.slots[rows].contiguous(), own.block_table[held].contiguous())
        for window, own in batch.windows.items()
    }


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Rows [start, stop) of a batch, with their sequences."""
    starts = batch.query_start.clamp(start, stop)
    present = (starts[1:] > starts[:-1]).nonzero()[:, 0]
    ends = starts[1:][present].long()
    return Batch(
        positions=batch.positions[start:stop],
        slots=batch.slots[start:stop],
        query_start=torch.cat((starts[present[:1]], starts[1:][present])).sub(start).to(torch.int32),
        context_lens=batch.positions[ends - 1] + 1,
        block_table=batch.block_table[present].contiguous(),
        state_slots=None if batch.state_slots is None else batch.state_slots[present].contiguous(),
        state_sources=None if batch.state_sources is None else batch.state_sources[present].contiguous(),
        windows=_windows(batch, slice(start, stop), present),
        ids=None if batch.ids is None else batch.ids[start:stop],
    )


class PlanError(ValueError):
    """A layout this model cannot be sharded into; the message names the value and what would fit."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Number of ranks in each parallel dimension."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp_attention: bool = False  # each copy of the tp ranks runs different sequences

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if self.ep > 1 and self.ep % self.tp:
            raise PlanError(f"ep: got {self.ep}; expected 1 or a multiple of tp = {self.tp}")
        if self.dp_attention and self.ep <= self.tp:
            raise PlanError(f"dp_attention: got True with ep = {self.ep}; expected ep > tp = {self.tp}")

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return max(self.tp, self.ep)

    @property
    def world(self) -> int:
        """Total number of ranks."""
        return self.stage_ranks * self.pp

    def place(self, rank: int) -> Place:
        """Coordinates of a rank; a stage is a run of consecutive ranks."""
        if not 0 <= rank < self.world:
            raise PlanError(f"rank: got {rank}; expected 0…{self.world - 1}")
        stage, local = divmod(rank, self.stage_ranks)
        return Place(rank, stage, local, local % self.tp, local // self.tp)

    @property
    def copies(self) -> int:
        """Number of groups of tp ranks in a stage with equal slices apart from the routed experts."""
        return self.stage_ranks // self.tp

    @property
    def driver(self) -> int:
        """The rank that schedules and samples: the first rank of the last stage."""
        return self.world - self.stage_ranks

    def node(self, rank: int, nodes: int) -> int:
        """The host of a rank, out of `nodes`: consecutive ranks share a host, so stages stay together."""
        return rank * nodes // self.world

    def vocabulary_ranks(self, copy: int) -> list[int]:
        """The ranks that share one embedding and head, in slice order."""
        return [
            stage * self.stage_ranks + copy * self.tp + i for stage in range(self.pp) for i in range(self.tp)
        ]


@dataclass(frozen=True, slots=True)
class Place:
    """Coordinates of a rank."""

    rank: int
    stage: int
    local: int  # index within the stage; also its expert-parallel index
    tp: int  # its tensor-parallel index
    copy: int  # which of the stage's groups of tp ranks


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The cuts of every rank, derived from the config alone."""

    config: ModelConfig
    layout: Layout
    stages: tuple[range, ...]  # layers of each stage
    parameters: Parameters = field(compare=False)

    @classmethod
    def build(
        cls, config: ModelConfig, layout: Layout, nbytes: Callable[[str], int] | None = None
    ) -> ShardPlan:
        """Balance stages by bytes (2 per parameter unless `nbytes` is given). Raises PlanError."""
        _check(config, layout)
        return cls(config, layout, _stages(config, layout, nbytes), Parameters(config))

    @classmethod
    def spread(cls, config: ModelConfig, gpus: int) -> ShardPlan:
        """Experts over any number of ranks, each with its own attention: for estimates, not for serving."""
        layers = range(config.num_hidden_layers)
        return cls(config, Layout(ep=gpus, dp_attention=gpus > 1), (layers,), Parameters(config))

    def cut(self, name: str, place: Place) -> Cut | None:
        """The part of a parameter that a rank reads; None if it reads none of it."""
        layer, tensor = layer_of(name), self.parameters[name]
        if tensor.role in ("embedding", "head"):
            return self.vocabulary(place)
        if layer is None or tensor.part == "ends":
            return Cut(None)  # the norms before a head, whose slices are on every rank
        if not self.holds_layer(layer, place):
            return None
        if tensor.part == "shared" and place.copy and not self.layout.dp_attention:
            return None  # copies are summed, so only one of them adds the shared expert
        if tensor.expert is not None and self.layout.ep > 1:
            return Cut(None) if tensor.expert in self.experts(place) else None
        return tensor.cut(self.layout.tp, place.tp)

    def vocabulary(self, place: Place) -> Cut:
        """Rows of embedding and head on a rank."""
        n, i = self.layout.tp * self.layout.pp, place.stage * self.layout.tp + place.tp
        v = self.config.vocab_size
        return Cut(0, v * i // n, v * (i + 1) // n)

    def holds_layer(self, layer: int, place: Place) -> bool:
        """MTP layers are on the last stage."""
        if layer >= self.config.num_hidden_layers:
            return place.stage == self.layout.pp - 1
        return layer in self.stages[place.stage]

    def layers_of(self, place: Place) -> set[int]:
        """A rank's layers, MTP layers included."""
        layers = range(self.config.num_hidden_layers + self.config.num_nextn_predict_layers)
        return {i for i in layers if self.holds_layer(i, place)}

    def experts(self, place: Place) -> range:
        """The routed experts of a rank."""
        count = self.config.n_routed_experts // self.layout.ep
        index = place.local if self.layout.ep > 1 else 0
        return range(index * count, (index + 1) * count)


@lru_cache(maxsize=4)
def representatives(config: ModelConfig) -> tuple[tuple[Tensor, int], ...]:
    """(parameter, multiplicity): the first routed expert of a layer represents all of them."""
    return tuple(
        (tensor, 1 if tensor.expert is None else config.experts_in(layer_of(tensor.name) or 0))
        for tensor in each_kind(config)
    )


def _stages(config: ModelConfig, layout: Layout, nbytes: Callable[[str], int] | None) -> tuple[range, ...]:
    """Split layers into ranges that minimize the bytes of the heaviest rank."""
    layers, pp = config.num_hidden_layers, layout.pp
    weight = [0] * layers
    alone = [
        not ((index := config.mixer(i).index) and index.shared) and not (i > 0 and config.feed(i - 1).delayed)
        for i in range(layers)
    ]
    last = 0  # MTP layers, which are on the last stage
    for tensor, count in representatives(config):
        size = count * (nbytes(tensor.name) if nbytes else 2 * prod(tensor.shape))
        layer = layer_of(tensor.name)
        if tensor.expert is not None and layout.ep > 1:
            size //= layout.ep
        elif layer is not None and (cut := tensor.cut(layout.tp, 0)).dim is not None:
            size = size * cut.size // tensor.shape[cut.dim]
        if layer is not None and layer < layers:
            weight[layer] += size
        elif layer is not None:
            last += size

    @cache
    def best(start: int, stage: int) -> tuple[float, int]:
        """(bytes of the heaviest stage from `stage` on, end of `stage`) when layers start… are left."""
        if stage == pp - 1:
            return sum(weight[start:]) + last, layers
        # A layer that needs the previous one's token selection or experts' output stays on its stage.
        ends = [e for e in range(start + 1, layers - (pp - stage - 2)) if alone[e]]
        return min(
            ((max(sum(weight[start:end]), best(end, stage + 1)[0]), end) for end in ends),
            default=(math.inf, layers),
        )

    if best(0, 0)[0] == math.inf:
        raise PlanError(f"pp: got {pp}; expected at most {sum(alone)}, the layers that can start a stage")
    stages, start = [], 0
    for stage in range(pp):
        end = best(start, stage)[1]
        stages.append(range(start, end))
        start = end
    return tuple(stages)


def _check(config: ModelConfig, layout: Layout) -> None:
    c, tp = config, layout.tp
    if c.uneven and layout.world > 1:
        raise PlanError(
            "layer_sizes is set: layers of different sizes are served by one rank; expected tp, pp, ep = 1"
        )
    try:
        c.per_rank(tp)
    except ValueError as error:
        raise PlanError(str(error)) from None
    widths = {"intermediate_size": c.intermediate_size, "moe_intermediate_size": c.moe_intermediate_size}
    for name, size in widths.items():
        if 0 < size < tp:
            raise PlanError(f"tp: got {tp}; expected at most {name} = {size}")
    if layout.ep > 1 and not c.n_routed_experts:
        raise PlanError(f"ep: got {layout.ep}; expected 1: the model has no experts")
    if c.n_routed_experts % layout.ep:
        raise PlanError(f"ep: got {layout.ep}; expected a divisor of n_routed_experts = {c.n_routed_experts}")
    if layout.pp > c.num_hidden_layers:
        raise PlanError(f"pp: got {layout.pp}; expected at most num_hidden_layers = {c.num_hidden_layers}")
