"""One rank: its groups, its slice of the model, and its part of every step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.model import DeepseekModel, ModelConfig
from farthing.model.deepseek import routers_of
from farthing.model.experts import routers_for
from farthing.model.source import WeightSource
from farthing.ops import Batch, LatentCache, Ops, RouterSpec
from farthing.ops.api import CacheDtype
from farthing.parallel.group import Alone, DistGroup, Group
from farthing.parallel.ops import ParallelOps
from farthing.parallel.plan import Layout, Place, ShardPlan
from farthing.parallel.source import ShardedSource, local_config, local_routers


class Rank:
    """Built on every rank in the same order, since groups are made together."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        layout: Layout,
        rank: int,
        ops: Ops,
        routers: list[RouterSpec | None] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.plan = ShardPlan.build(config, layout)
        self.layout, self.place = layout, layout.place(rank)
        tp, stage = _groups(layout, self.place, timeout)
        experts = tp if layout.ep == 1 else stage
        first, last = self.place.stage == 0, self.place.stage == layout.pp - 1
        self.first, self.last = first, last
        self.model = DeepseekModel(
            local_config(self.plan, self.place),
            ParallelOps(ops, tp, experts),
            ShardedSource(source, self.plan, self.place),
            local_routers(self.plan, self.place, routers or routers_of(config)),
            first,
            last,
        )
        self.cache: LatentCache | None = None

    def new_cache(self, num_blocks: int, block_size: int, dtype: CacheDtype) -> LatentCache:
        """This rank's layers of the cache; block indices are the same on every rank."""
        self.cache = self.model.new_cache(num_blocks, block_size, dtype)
        return self.cache

    def forward(self, ids: Tensor, batch: Batch, counts: Tensor | None = None) -> Tensor:
        """This stage's layers. Hidden states come from the stage before and go to the one behind."""
        assert self.cache is not None
        if self.first:
            h = self.model.ops.embed(ids, self.model.embedding)
        else:
            h = torch.empty(len(ids), self.model.config.hidden_size, dtype=self.model.ops.dtype)
            dist.recv(h, self.place.rank - self.layout.stage_ranks)
        h = self.model.run_layers(h, batch, self.cache, counts)
        if not self.last:
            dist.send(h.contiguous(), self.place.rank + self.layout.stage_ranks)
        return h


def open_rank(
    path: Path, layout: Layout, rank: int, ops: Ops, experts: str = "auto", timeout: float = 60.0
) -> Rank:
    """A rank of a checkpoint; reads only its own bytes."""
    checkpoint = Checkpoint.open(path)
    config = ModelConfig.from_json(checkpoint.config)
    return Rank(
        config, checkpoint, layout, rank, ops, routers_for(config, checkpoint.config, experts), timeout
    )


def _groups(layout: Layout, place: Place, timeout: float) -> tuple[Group, Group]:
    """(tensor-parallel group, all of the stage). Every rank makes every group, in one order."""
    tp: Group = Alone()
    stage: Group = Alone()
    for s in range(layout.pp):
        start = s * layout.stage_ranks
        if layout.stage_ranks > 1:
            group = DistGroup(range(start, start + layout.stage_ranks), timeout)
            stage = group if group.index >= 0 else stage
        for first in range(start, start + layout.stage_ranks, layout.tp):
            if layout.tp > 1:
                group = DistGroup(range(first, first + layout.tp), timeout)
                tp = group if group.index >= 0 else tp
    return tp, stage
