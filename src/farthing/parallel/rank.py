"""One rank: its groups, its slice of the model, and its share of every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from farthing.checkpoint.layout import GROUP_INDICES, order_of
from farthing.checkpoint.reader import Checkpoint
from farthing.cpus import usable_cpus
from farthing.model import (
    CACHE_SCALES,
    FeedForward,
    ModelConfig,
    WeightSource,
    claim,
    config_of,
    layer_of,
    model_of,
    moe_weights,
    routers_for,
    routers_of,
    source_of,
)
from farthing.ops import (
    Batch,
    CacheDtype,
    Cut,
    LatentCache,
    Norm,
    Ops,
    RouterSpec,
    Weight,
    cut_weight,
    rows_in_order,
    share_of,
)
from farthing.parallel.collectives import Alone, DistGroup, Group, fastest
from farthing.parallel.ops import Groups, ParallelOps
from farthing.parallel.plan import (
    Layout,
    Place,
    Placement,
    Placements,
    ShardPlan,
    in_order,
    micro_batches,
    own_sequences,
    place,
)
from farthing.parallel.shared import Arena, SharedGroup, arena_bytes, group_bytes

_SHARED = tuple(name for pair in CACHE_SCALES for name in pair)  # by all ranks of a stage


class ShardedSource:
    """Maps local layers to the checkpoint's and slices tensors for tensor parallelism.

    Slices are read from a mapped safetensors file, so only their bytes are read.
    """

    def __init__(
        self, source: WeightSource, plan: ShardPlan, place: Place, placements: Placements | None = None
    ) -> None:
        """placements: local experts by checkpoint layer; missing layers use contiguous ranges."""
        self._source, self._plan, self._place = source, plan, place
        self._placements = placements if placements is not None else {}
        self._first = plan.stages[place.stage].start
        self._local = len(plan.stages[place.stage])

    def has(self, name: str) -> bool:
        """Whether the tensor is in the checkpoint and read by this rank."""
        name = self._global(name)
        if name.endswith(_SHARED):
            return self._source.has(name)
        return (
            self._source.has(name)
            and self._plan.parameters.find(name) is not None
            and self._plan.cut(name, self._place) is not None
        )

    def holds(self, module: str) -> bool:
        """Whether this rank computes an expert, of which a shared one belongs to one group of tp ranks, or
        what follows the last layer."""
        if not module.startswith("model.layers."):
            return self._place.stage == self._plan.layout.pp - 1
        if module.endswith("shared_experts"):
            return self._place.copy == 0 or self._plan.layout.dp_attention
        module = self._global(module)
        placement = self._placements.get(layer_of(module) or 0)
        if placement is not None:
            return int(module.rpartition(".")[2]) in placement.ranks[self._place.local]
        return self._plan.cut(f"{module}.gate_proj.weight", self._place) is not None

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A plain parameter, or its slice. The plan's shape is checked; `shape` is the local shape."""
        if name.endswith(_SHARED):
            return self._source.tensor(self._global(name), shape)
        name, cut = self._cut(name)
        value = self._source.tensor(name, self._plan.parameters[name].shape)
        return cut.of(value)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """A matrix, or its slice, in its stored format if the slice allows it."""
        name, cut = self._cut(f"{module}.weight")
        rows, columns = self._plan.parameters[name].shape
        module = name.removesuffix(".weight")
        weight = self._source.weight(module, (rows, columns))
        if cut.dim is None:
            return weight
        if (order := self._inner_order(module)) is not None:  # ranks divide the neurons in down's order
            weight = rows_in_order(weight, order) if cut.dim == 0 else replace(weight, order=None)
        return cut_weight(weight, cut)

    def _inner_order(self, module: str) -> Tensor | None:
        """The order of the columns of a gated MLP's down projection; None without one, or elsewhere."""
        prefix, _, kind = module.rpartition(".")
        if kind not in ("gate_proj", "up_proj", "down_proj"):
            return None
        for name in (f"{prefix}.down_proj.{suffix}" for suffix in GROUP_INDICES):
            if self._source.has(name):
                return order_of(self._source.tensor(name))
        return None

    def _cut(self, name: str) -> tuple[str, Cut]:
        name = self._global(name)
        if self._plan.parameters[name].expert is not None and self._plan.layout.ep > 1:
            return name, Cut(None)  # experts are never sliced, and only read by ranks that hold them
        cut = self._plan.cut(name, self._place)
        assert cut is not None, f"rank {self._place.rank} does not hold {name}"
        return name, cut

    def layer(self, local: int) -> int:
        """The checkpoint's index of a layer of this rank's model; MTP layers follow the others."""
        if local < self._local:
            return local + self._first
        return self._plan.config.num_hidden_layers + local - self._local

    def _global(self, name: str) -> str:
        if not name.startswith("model.layers."):
            return name
        parts = name.split(".")
        parts[2] = str(self.layer(int(parts[2])))
        return ".".join(parts)


def local_config(plan: ShardPlan, place: Place) -> ModelConfig:
    """The config of a rank's model: its layers, heads, and slice of dense and shared experts."""
    c, tp = plan.config, plan.layout.tp
    last = place.stage == plan.layout.pp - 1
    vocabulary = plan.vocabulary(place)
    part = c.part(plan.stages[place.stage]).per_rank(tp)
    return replace(
        part,
        num_nextn_predict_layers=c.num_nextn_predict_layers if last else 0,
        feeds=tuple(replace(feed, width=share_of(feed.width, tp, place.tp)) for feed in part.feeds),
        vocab_size=vocabulary.stop - vocabulary.start,
    )


def local_routers(
    plan: ShardPlan, place: Place, routers: list[RouterSpec | None] | None
) -> list[RouterSpec | None]:
    """The routers of a rank's layers, out of those of the whole model."""
    routers = routers or routers_of(plan.config)
    mtp = routers[plan.config.num_hidden_layers :] if place.stage == plan.layout.pp - 1 else []
    return [routers[i] for i in plan.stages[place.stage]] + mtp


class Rank:
    """Built on every rank in the same order, because groups are created collectively. All ranks then make
    the same calls."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        layout: Layout,
        rank: int,
        ops: Ops,
        routers: list[RouterSpec | None] | None = None,
        timeout: float = 60.0,
        arena: Arena | None = None,
        nodes: int = 1,
    ) -> None:
        """arena: shared memory for the groups within a node; None: torch.distributed for all groups."""
        self.plan = ShardPlan.build(config, layout)
        self.layout, self.place = layout, layout.place(rank)
        self.first, self.last = self.place.stage == 0, self.place.stage == layout.pp - 1
        groups = _make_groups(layout, rank, timeout, arena, nodes, ops.device)
        self._stage = groups.get(_stage_ranks(layout, self.place), Alone())
        self._before = groups.get((rank - layout.stage_ranks, rank))
        self._behind = groups.get((rank, rank + layout.stage_ranks))
        self._groups = _groups(self.plan, self.place, groups)
        self.placements: dict[int, Placement] = {}
        self._source = ShardedSource(source, self.plan, self.place, self.placements)
        local = local_config(self.plan, self.place)
        self.routers = local_routers(self.plan, self.place, routers or routers_of(config))
        # Every rank has its slice of embedding and head, and the norms before the head.
        self.model = model_of(local, ParallelOps(ops, self._groups, self._shares), self._source, self.routers)
        self._draft_norms = [
            Norm(
                source.tensor(f"model.layers.{i}.shared_head.norm.weight", (config.hidden_size,)).float()
                + config.norm_offset,
                config.rms_norm_eps,
            )
            for i in range(
                config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers
            )
        ]
        self.cache: LatentCache | None = None
        self.counts: Tensor | None = None  # [layers from this stage on, E], if this rank counts tokens

    def new_cache(
        self,
        num_blocks: int,
        block_size: int,
        dtype: CacheDtype,
        windows: Mapping[int, int] | None = None,
        slots: int | None = None,
    ) -> LatentCache:
        """The cache of this rank's layers; block indices are the same on every rank."""
        self.cache = self.model.new_cache(num_blocks, block_size, dtype, windows, slots)
        return self.cache

    def copy_states(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the recurrent states of this rank's layers: (source, target) slots."""
        assert self.cache is not None
        if self.cache.state is not None or self.cache.open is not None:
            self.model.copy_states(self.cache, pairs)

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """Run this stage's layers -> hidden [T, D]; on the last stage, the model's output.

        Hidden states arrive from the previous stage and go to the next one, per micro-batch.
        """
        assert self.cache is not None
        whole = batch = replace(batch, ids=ids)
        if self.layout.dp_attention:
            own, batch = own_sequences(whole, self.layout.copies, self.place.copy)
            ids = ids[own] if len(own) else ids[:1]
        h = self.model.embed(ids)
        parts = []
        # Copies with different tokens synchronize in every MoE layer, so each runs one batch per step.
        most = 1 if self.layout.dp_attention else self.layout.pp
        for rows, part in micro_batches(batch, most):
            x = h[rows]
            if self._before is not None:
                x = self._before.broadcast(torch.empty_like(x), 0)
            x = self.model.run_layers(x, part, self.cache, self.counts)
            if self._behind is not None:
                self._behind.broadcast(x, 0)
            parts.append(x)
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._gathered(x, whole) if self.layout.dp_attention and self.last else x

    def _gathered(self, own: Tensor, batch: Batch) -> Tensor:
        """Gather all copies' rows in batch order, on every rank of the stage."""
        out = own.new_empty(len(batch.positions), own.shape[1])
        for copy in range(self.layout.copies):
            rows, _ = own_sequences(batch, self.layout.copies, copy)
            if len(rows):
                part = own if copy == self.place.copy else own.new_empty(len(rows), own.shape[1])
                out[rows] = self._stage.broadcast(part, copy * self.layout.tp)
        return out

    def draft(self, next_ids: Tensor, batch: Batch, step: int, hidden: Tensor | None = None) -> Tensor | None:
        """`DecoderModel.draft` on the last stage; the other ranks supply their rows of the embedding.

        hidden [T, D], or in streams: valid on the driver.
        """
        whole = batch
        if self.layout.dp_attention:
            rows, batch = own_sequences(whole, self.layout.copies, self.place.copy)
            rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64)
        if not self.last:
            own = next_ids[rows] if self.layout.dp_attention else next_ids
            self.model.ops.embed(own, self.model.embedding)
            return None
        assert self.cache is not None
        hidden = self._stage.broadcast(self._rows(len(next_ids), hidden, self.plan.config.state_width), 0)
        if self.layout.dp_attention:
            drafted = self.model.draft(next_ids[rows], hidden[rows], batch, self.cache, step, self.counts)
            return self._gathered(drafted, whole)
        return self.model.draft(next_ids, hidden, batch, self.cache, step, self.counts)

    def logits(self, rows: int, step: int | None = None, hidden: Tensor | None = None) -> Tensor | None:
        """Logits [rows, V] float32 for the driver's hidden [rows, D]; for a draft if step is given."""
        if self.place.copy:
            return None
        model, hidden, norm = self.model, *self._spread(rows, step, hidden)
        return model.ops.logits(hidden, model.head, norm)

    def top_logits(
        self, rows: int, k: int, step: int | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Like `logits`, but only the k largest."""
        if self.place.copy:
            return None
        model, hidden, norm = self.model, *self._spread(rows, step, hidden)
        return model.ops.top_logits(hidden, model.head, norm, k)

    def count(self) -> Tensor:
        """[L, E] token counts of every expert on all stages, reduced when stages share no memory."""
        config = self.plan.config
        table = torch.zeros(counted_layers(config), config.router_size, dtype=torch.int64)
        if self.counts is not None:
            table[self.plan.stages[self.place.stage].start :] = self.counts
        dist.all_reduce(table)
        return table

    def rebalance(self, tokens: Mapping[int, list[int]], redundant: int) -> None:
        """Re-place experts by the measured tokens per layer, and read those that moved to this rank.

        tokens: by checkpoint layer. Every rank computes the same placement.
        """
        first = self.plan.stages[self.place.stage].start
        hidden, local = self.plan.config.num_hidden_layers, len(self.model.layers)
        blocks = {first + i: (i, block) for i, (_, block) in enumerate(self.model.layers)}
        blocks |= {hidden + i: (local + i, mtp.feed_forward) for i, mtp in enumerate(self.model.mtp)}
        for layer, (index, block) in blocks.items():
            router = self.routers[index]
            if router is None or layer not in tokens:
                continue
            routed = tokens[layer][: router.num_experts - router.identities]
            placement = place(routed, self.layout.ep, redundant)
            if placement != self._placement(layer):
                self.placements[layer] = placement
                self.model.unstack()  # it references the experts that leave
                self._pack_again(index, block, router)
        if self.model.stack is None:
            self.model.restack()

    def _pack_again(self, index: int, block: FeedForward, router: RouterSpec) -> None:
        p = f"model.layers.{index}.mlp"
        block.packed = None  # otherwise one layer's experts are in memory twice
        self.model.ops.forget(f"{p}.")
        experts = self.model.config.feed(index).experts
        assert experts is not None, "as its router is not"
        block.packed = self.model.ops.pack_moe(
            p, router, lambda: moe_weights(self.model.config, self._source, p, experts)
        )

    def _placement(self, layer: int) -> Placement:
        return self.placements.get(layer) or in_order(self.plan.config.n_routed_experts, self.layout.ep)

    def _shares(self, name: str) -> dict[tuple[int, int], tuple[int, ...]]:
        """The shares of the experts in `model.layers.<local>.mlp`."""
        layer = self._source.layer(int(name.split(".")[2]))
        if self.layout.ep == 1:
            return {(1, 0): tuple(range(self.plan.config.n_routed_experts))}
        return self._placement(layer).shares(self.place.local)

    def _spread(self, rows: int, step: int | None, hidden: Tensor | None) -> tuple[Tensor, Norm]:
        """Broadcast the driver's hidden states to all slices of the head; also returns the norm before it.

        Streams are summed on the driver, so that ranks receive [rows, D].
        """
        group = self._groups.vocabulary
        root = self.layout.vocabulary_ranks(0).index(self.layout.driver)
        norm = self.model.norm if step is None else self._draft_norms[min(step, len(self._draft_norms) - 1)]
        if hidden is not None:
            hidden = self.model.summed(hidden, step)
        return group.broadcast(self._rows(rows, hidden, self.plan.config.hidden_size), root), norm

    def _rows(self, rows: int, hidden: Tensor | None, width: int) -> Tensor:
        if hidden is not None:
            return hidden
        ops = self.model.ops
        return torch.empty(rows, width, dtype=ops.dtype, device=ops.device)


def open_rank(
    path: Path,
    layout: Layout,
    rank: int,
    ops: Ops,
    experts: str = "auto",
    timeout: float = 60.0,
    arena: Arena | None = None,
    nodes: int = 1,
) -> Rank:
    """Load one rank of a checkpoint; reads only that rank's bytes."""
    checkpoint = Checkpoint.open(path)
    config = ShardPlan.build(config_of(checkpoint), layout).config
    routers = routers_for(config, checkpoint.config, experts)
    claim(ops, f"{checkpoint.fingerprint()}, {layout}, rank {rank}", path)
    return Rank(config, source_of(checkpoint, config), layout, rank, ops, routers, timeout, arena, nodes)


def counted_layers(config: ModelConfig) -> int:
    """Layers whose expert tokens are counted."""
    return config.num_hidden_layers + config.num_nextn_predict_layers


Ranks = tuple[int, ...]


def group_ranks(layout: Layout) -> list[Ranks]:
    """The ranks of every group of a layout, in creation order, without groups of one rank.

    Groups with equal ranks are one group, so their collectives run in the same order on all of them.
    """
    groups: list[Ranks] = []
    for s in range(layout.pp):
        start = s * layout.stage_ranks
        groups.append(tuple(range(start, start + layout.stage_ranks)))
        groups += [
            tuple(range(first, first + layout.tp))
            for first in range(start, start + layout.stage_ranks, layout.tp)
        ]
        if s + 1 < layout.pp:
            groups += [(r, r + layout.stage_ranks) for r in range(start, start + layout.stage_ranks)]
    groups += [tuple(layout.vocabulary_ranks(copy)) for copy in range(layout.copies)]
    return [ranks for ranks in dict.fromkeys(groups) if len(ranks) > 1]


def shared_bytes(layout: Layout, nodes: int = 1, node: int = 0) -> int:
    """Bytes of shared memory used by the groups within one node."""
    return arena_bytes(
        [len(ranks) for ranks in group_ranks(layout) if _homes(layout, ranks, nodes) == {node}]
    )


def _homes(layout: Layout, ranks: Ranks, nodes: int) -> set[int]:
    return {layout.node(r, nodes) for r in ranks}


def _make_groups(
    layout: Layout, rank: int, timeout: float, arena: Arena | None, nodes: int, device: torch.device
) -> dict[Ranks, Group]:
    """This rank's groups. torch.distributed requires every rank to create every group in one order."""
    groups: dict[Ranks, Group] = {}
    offset, mine = 0, layout.node(rank, nodes)
    neighbours = sum(layout.node(r, nodes) == mine for r in range(layout.world))
    crowded = neighbours > usable_cpus()
    for ranks in group_ranks(layout):
        homes = _homes(layout, ranks, nodes)
        if arena is None or len(homes) > 1:
            distributed = DistGroup(ranks, timeout)
            direct = device.type == "cuda" and homes == {mine} and rank in ranks
            group: Group = fastest(distributed, device) if direct else distributed
        elif homes == {mine}:
            if rank in ranks:
                group = SharedGroup(arena, offset, len(ranks), ranks.index(rank), timeout, crowded=crowded)
            offset += group_bytes(len(ranks))
        if rank in ranks:
            groups[ranks] = group
    return groups


def _stage_ranks(layout: Layout, place: Place) -> Ranks:
    start = place.stage * layout.stage_ranks
    return tuple(range(start, start + layout.stage_ranks))


def _groups(plan: ShardPlan, place: Place, groups: Mapping[Ranks, Group]) -> Groups:
    layout = plan.layout
    first = place.rank - place.tp
    tp = groups.get(tuple(range(first, first + layout.tp)), Alone())
    holders = layout.vocabulary_ranks(place.copy)
    slices = [plan.vocabulary(layout.place(r)) for r in holders]
    return Groups(
        tp=tp,
        experts=tp if layout.ep == 1 else groups.get(_stage_ranks(layout, place), Alone()),
        vocabulary=groups.get(tuple(holders), Alone()),
        dispatch=layout.dp_attention,
        rows=(*(cut.start for cut in slices), plan.config.vocab_size),
    )
