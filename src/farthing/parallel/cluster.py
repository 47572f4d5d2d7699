"""A model spread over processes of this host that the engine drives as if it were one.

The driver is the first rank of the last stage: it has the hidden states that the head needs. Each call is
sent to every worker, which makes the same call on its own slice; the collectives inside keep them in step.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from farthing.model import ModelConfig
from farthing.ops import Batch, LatentCache, Ops, select
from farthing.ops.api import CacheDtype
from farthing.parallel.plan import Layout
from farthing.parallel.rank import Rank, open_rank

log = logging.getLogger(__name__)
START_TIMEOUT = 300.0  # seconds for every rank to load
STEP_TIMEOUT = 60.0  # seconds a collective may wait


class RankFailed(RuntimeError):
    """A worker process ended; the model cannot go on without it."""


@dataclass(frozen=True, slots=True)
class RankOptions:
    """What every rank builds its part from."""

    path: Path
    layout: Layout
    backend: str = "auto"
    dtype: torch.dtype | None = None
    threads: int | None = None
    quantization: str | None = None
    experts: str = "auto"

    def ops(self) -> Ops:
        """This rank's backend; by default its share of the cores."""
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.layout.world)
        return select(self.backend, self.dtype, threads, self.quantization)  # type: ignore[arg-type]


class ParallelModel:
    """Looks like a DeepseekModel to the engine; `close` ends the workers."""

    def __init__(self, options: RankOptions) -> None:
        layout = options.layout
        self._rank_index = layout.world - layout.stage_ranks
        port = _free_port()
        context = multiprocessing.get_context("spawn")
        self._workers: dict[int, tuple[Any, Connection]] = {}
        for rank in range(layout.world):
            if rank != self._rank_index:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(options, rank, port, theirs), daemon=True)
                process.start()
                theirs.close()
                self._workers[rank] = (process, ours)
        self._failed: str | None = None
        self._closed = False
        threading.Thread(target=self._watch, name="farthing-ranks", daemon=True).start()
        try:
            _join(layout, self._rank_index, port)
            self._rank = open_rank(
                options.path, layout, self._rank_index, options.ops(), options.experts, STEP_TIMEOUT
            )
        except BaseException:
            self.close()
            raise
        self.config: ModelConfig = self._rank.plan.config
        self.ops = self._rank.model.ops
        self.mtp = self._rank.model.mtp

    @property
    def cache_layers(self) -> int:
        """Layers of the whole model; each rank's cache holds its own."""
        return self.config.num_hidden_layers + self.config.num_nextn_predict_layers

    def new_cache(self, num_blocks: int, block_size: int = 16, dtype: CacheDtype = "bfloat16") -> LatentCache:
        """A cache on every rank; this one's is returned."""
        return self._everywhere("new_cache", num_blocks, block_size, dtype)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None) -> Tensor:
        """See `DeepseekModel.forward`; counts are of this rank's stage alone."""
        self._tell("forward", ids, batch)
        first = self._rank.plan.stages[self._rank.place.stage].start
        own = None if counts is None else counts[first:]
        return self._guard(lambda: self._rank.forward(ids, batch, own))  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `DeepseekModel.logits`."""
        return self._on_model("logits", hidden)  # type: ignore[no-any-return]

    def top_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `DeepseekModel.top_logits`."""
        return self._on_model("top_logits", hidden, k)  # type: ignore[no-any-return]

    def draft(
        self,
        next_ids: Tensor,
        hidden: Tensor,
        batch: Batch,
        cache: LatentCache,
        step: int = 0,
        counts: Tensor | None = None,
    ) -> Tensor:
        """See `DeepseekModel.draft`."""
        self._tell("draft", next_ids, hidden, batch, step)
        return self._guard(  # type: ignore[no-any-return]
            lambda: _draft(self._rank, next_ids, hidden, batch, step)
        )

    def draft_logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """See `DeepseekModel.draft_logits`."""
        return self._on_model("draft_logits", hidden, step)  # type: ignore[no-any-return]

    def draft_top_logits(self, hidden: Tensor, k: int, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """See `DeepseekModel.draft_top_logits`."""
        return self._on_model("draft_top_logits", hidden, k, step)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        for process, connection in self._workers.values():
            connection.close()
            process.join(0.2)
            if process.is_alive():
                process.terminate()
            process.join(5)
        if dist.is_initialized():
            dist.destroy_process_group()

    def _everywhere(self, method: str, *arguments: Any) -> Any:
        self._tell(method, *arguments)
        return self._guard(lambda: getattr(self._rank, method)(*arguments))

    def _on_model(self, method: str, *arguments: Any) -> Any:
        self._tell(f"model.{method}", *arguments)
        return self._guard(lambda: getattr(self._rank.model, method)(*arguments))

    def _tell(self, *call: Any) -> None:
        if self._failed:
            raise RankFailed(self._failed)
        try:
            for _, connection in self._workers.values():
                connection.send(call)
        except OSError as error:
            raise RankFailed(self._failed or f"a rank does not answer: {error}") from error

    def _guard(self, compute: Callable[[], Any]) -> Any:
        """Run this rank's part; a collective that breaks is reported as the rank that broke it."""
        try:
            return compute()
        except RuntimeError as error:
            raise RankFailed(self._failed or f"a rank does not answer: {error}") from error

    def _watch(self) -> None:
        """A worker that ends takes the replica with it: its peers would wait in vain."""
        sentinels = {process.sentinel: rank for rank, (process, _) in self._workers.items()}
        ended = wait(list(sentinels)) if sentinels else []
        if self._closed or not ended:
            return
        rank = sentinels[ended[0]]  # type: ignore[index]
        process = self._workers[rank][0]
        process.join(1)
        code = process.exitcode
        self._failed = (
            f"rank {rank} of {len(self._workers) + 1} ended with exit code {code}; restart the replica"
        )
        log.error("%s", self._failed)
        for peer, _ in self._workers.values():
            peer.terminate()


def _draft(rank: Rank, next_ids: Tensor, hidden: Tensor, batch: Batch, step: int) -> Tensor:
    assert rank.cache is not None
    return rank.model.draft(next_ids, hidden, batch, rank.cache, step)


def _work(options: RankOptions, index: int, port: int, connection: Connection) -> None:
    """A worker's life: load, then make the driver's calls until it hangs up."""
    try:
        torch.set_grad_enabled(False)
        _join(options.layout, index, port)
        rank = open_rank(options.path, options.layout, index, options.ops(), options.experts, STEP_TIMEOUT)
        while True:
            method, *arguments = connection.recv()
            if method == "draft":
                if rank.last:
                    _draft(rank, *arguments)
            elif method.startswith("model."):
                if rank.last:
                    getattr(rank.model, method.removeprefix("model."))(*arguments)
            else:
                getattr(rank, method)(*arguments)
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _join(layout: Layout, rank: int, port: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        world_size=layout.world,
        rank=rank,
        timeout=timedelta(seconds=START_TIMEOUT),
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
