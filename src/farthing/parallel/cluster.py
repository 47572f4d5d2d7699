"""A model sharded over processes on this host or a Ray cluster, driven by the engine like a single model.

The driver is the first rank of the last stage, which produces the final hidden states. Each call is sent to
every worker, which makes the same call on its own slice; the collectives inside keep ranks synchronized.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farthing.checkpoint.reader import Checkpoint
from farthing.model import ModelConfig, config_of
from farthing.ops.api import Batch, CacheDtype, LatentCache
from farthing.parallel.plan import ShardPlan
from farthing.parallel.rank import counted_layers
from farthing.parallel.shared import Arena, available
from farthing.parallel.worker import (
    RankFailed,
    RankOptions,
    Workers,
    counts_bytes,
    counts_table,
    join,
    listen,
    node_arena,
    open_own,
)

log = logging.getLogger(__name__)
COUNT_EVERY = 32  # steps between reductions of expert token counts without shared memory


class ParallelModel:
    """Has the interface of DecoderModel for the engine; `close` stops the workers."""

    def __init__(self, options: RankOptions) -> None:
        layout = options.layout
        # Rejects invalid layouts before any process is started.
        config = ShardPlan.build(config_of(Checkpoint.open(options.path)), layout).config
        arena = _arena(options, config)
        try:
            self._workers, arena = _start(options, arena)
        except BaseException:
            if arena is not None:
                arena.unlink()
            raise
        try:
            self._rank = open_own(options, layout.driver, arena)
            self._workers.await_all("ready")
        except BaseException:
            self.close()
            raise
        finally:
            if arena is not None:
                arena.unlink()
        self.config: ModelConfig = self._rank.plan.config
        self.ops = self._rank.model.ops
        self.mtp = self._rank.model.mtp
        # [L, E]: every stage's counts, in shared memory or reduced periodically.
        self._counts_shared = arena is not None and options.config.nodes == 1
        if arena is not None and self._counts_shared:
            self._counts = counts_table(arena, layout, config)
        else:
            self._counts = torch.zeros(counted_layers(config), config.router_size, dtype=torch.int64)
        self._options, self._steps = options, 0
        self._failure: str | None = None  # of a call
        self._balanced = self._counts.clone()

    @property
    def layered(self) -> None:
        """Always None: the layers belong to several ranks."""
        return None

    @property
    def cache_layers(self) -> int:
        """Layers of the whole model; each rank's cache has only its own layers."""
        return self.config.num_hidden_layers + self.config.num_nextn_predict_layers

    def new_cache(
        self,
        num_blocks: int,
        block_size: int = 16,
        dtype: CacheDtype = "bfloat16",
        windows: Mapping[int, int] | None = None,
        slots: int | None = None,
    ) -> LatentCache:
        """Create a cache on every rank; returns this rank's."""
        return self._everywhere(  # type: ignore[no-any-return]
            "new_cache", num_blocks, block_size, dtype, windows, slots
        )

    def copy_states(self, cache: LatentCache, pairs: list[tuple[int, int]]) -> None:
        """Copy recurrent states on every rank: (source, target) slots."""
        self._everywhere("copy_states", pairs)

    def forward(self, ids: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None) -> Tensor:
        """See `DecoderModel.forward`. counts is set to the totals of all stages, up to COUNT_EVERY steps old
        without shared memory."""
        every = self._options.config.rebalance_steps
        self._steps += 1
        if every and self._steps % every == 0:
            self.rebalance()
        elif self._steps % COUNT_EVERY == 0:
            self._count()
        hidden: Tensor = self._everywhere("forward", ids, batch)
        if counts is not None:
            counts.copy_(self._counts)
        return hidden

    def first_not_finite(self, ids: Tensor, batch: Batch, cache: LatentCache) -> str | None:
        """Always None: the layers' outputs are in other processes. A single rank names the layer."""
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """See `DecoderModel.logits`."""
        return self._head("logits", hidden, len(hidden), None)  # type: ignore[no-any-return]

    def normed(self, hidden: Tensor) -> Tensor:
        """Not available: admission refuses it."""
        raise NotImplementedError("the final norm is on the last stage's ranks")

    def top_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `DecoderModel.top_logits`."""
        return self._head("top_logits", hidden, len(hidden), k, None)  # type: ignore[no-any-return]

    def draft(
        self,
        next_ids: Tensor,
        hidden: Tensor,
        batch: Batch,
        cache: LatentCache,
        step: int = 0,
        counts: Tensor | None = None,
    ) -> Tensor:
        """See `DecoderModel.draft`."""
        return self._head("draft", hidden, next_ids, batch, step)  # type: ignore[no-any-return]

    def draft_logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """See `DecoderModel.draft_logits`."""
        return self._head("logits", hidden, len(hidden), step)  # type: ignore[no-any-return]

    def greedy(self, hidden: Tensor) -> list[int]:
        """See `DecoderModel.greedy`."""
        return self.top_logits(hidden, 1)[1][:, 0].tolist()  # type: ignore[no-any-return]

    def draft_top_logits(self, hidden: Tensor, k: int, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Like `top_logits`, for a draft."""
        return self._head("top_logits", hidden, len(hidden), k, step)  # type: ignore[no-any-return]

    def rebalance(self) -> None:
        """Place experts by the tokens each has seen since the last placement, between two steps."""
        if self._options.layout.ep == 1:
            return
        self._count()
        seen = self._counts - self._balanced
        self._balanced = self._counts.clone()
        tokens = {i: seen[i].tolist() for i in range(self.cache_layers) if int(seen[i].sum())}
        copies = self._options.config.redundant_experts
        self._everywhere("rebalance", tokens, copies)
        log.info("experts rebalanced: %d layers, %d copies", len(tokens), copies)

    def _count(self) -> None:
        """Reduce the experts' token counts over ranks that do not share memory."""
        if not self._counts_shared and self.config.n_routed_experts:
            self._counts = self._everywhere("count")

    def failure(self) -> str | None:
        """Why the model cannot continue; None if it can."""
        return self._failure or self._workers.failure()

    def close(self) -> None:
        """Stop the workers."""
        self._workers.close()
        _leave()

    def _everywhere(self, method: str, *arguments: Any) -> Any:
        self._workers.tell(method, *arguments)
        return self._guard(lambda: getattr(self._rank, method)(*arguments))

    def _head(self, method: str, hidden: Tensor, *arguments: Any) -> Any:
        """The driver's hidden states are broadcast, not sent with the call."""
        self._workers.tell(method, *arguments)
        return self._guard(lambda: getattr(self._rank, method)(*arguments, hidden=hidden))

    def _guard(self, compute: Callable[[], Any]) -> Any:
        """Run this rank's part; a broken collective is reported as a failure of the rank that broke it.

        After any exception the ranks are at different places, so that no later call can be answered.
        """
        try:
            return compute()
        except Exception as error:
            failure = self._workers.failure(wait=self._workers.notice)
            if failure is None:
                log.error("rank %d, the driver's, failed", self._options.layout.driver, exc_info=error)
                failure = f"rank {self._options.layout.driver}, the driver's, failed; restart the replica"
            self._failure = failure
            raise RankFailed(failure) from error


def _start(options: RankOptions, arena: Arena | None) -> tuple[Any, Arena | None]:
    """Start every other rank's process, join them over torch.distributed if needed, and make the arena."""
    layout = options.layout
    if arena is not None:
        return Workers(options, arena, None), arena
    several = options.config.nodes > 1
    ray = _on_nodes(options) if several else None
    store = listen(ray.address if ray else Workers.address, layout)
    workers = ray or Workers(options, None, store.port)
    try:
        workers.await_all("started")
        name = None
        if ray is not None:
            name = None if options.config.transport == "gloo" or options.device == "cuda" else _arena_name()
            ray.open(store.port, name)
        join(layout, layout.driver, store, options.device, workers.address if several else "")
        if ray is not None and name is not None:
            arena = ray.arena = node_arena(layout, layout.driver, options.config.nodes, name)
    except BaseException:
        workers.close()
        _leave()
        raise
    return workers, arena


def _on_nodes(options: RankOptions) -> Any:
    """The workers of ranks on several nodes, of whichever package registers them; like `Workers`."""
    if (found := next(iter(entry_points(group="farthing.ranks")), None)) is None:
        raise ValueError("nodes is more than 1; expected 1, as no package for several nodes is installed")
    return found.load()(options)


def _arena_name() -> str:
    return f"farthing-{uuid.uuid4().hex[:12]}"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _arena(options: RankOptions, config: ModelConfig) -> Arena | None:
    """Shared memory for groups within one host and expert counts; None: use torch.distributed."""
    if options.config.transport == "shared" and (options.config.nodes > 1 or options.device == "cuda"):
        raise ValueError(
            "transport is 'shared' with several nodes or GPUs; expected 'auto' (shared memory within a node "
            "of CPU ranks, gloo or NCCL between others) or 'gloo'"
        )
    if options.config.transport == "gloo" or options.config.nodes > 1 or options.device == "cuda":
        return None
    if available():
        try:
            return Arena.create(options.arena_bytes + counts_bytes(config))
        except OSError as error:
            problem = f"{options.arena_bytes / 1e6:.0f} MB of shared memory: {error.strerror}"
    else:
        problem = "shared memory needs Linux on x86-64"
    if options.config.transport == "shared":
        raise ValueError(f"transport: got 'shared' ({problem}); expected 'auto' or 'gloo'")
    log.warning("ranks exchange through gloo: %s", problem)
    return None


__all__ = ["ParallelModel", "RankFailed", "RankOptions"]
