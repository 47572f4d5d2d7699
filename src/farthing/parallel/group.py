"""Collectives over one group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """A group of ranks with its collectives."""

    size: int
    index: int  # this rank's index within the group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's x; may write into x."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x (equal shapes), in group order."""
        ...

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """The x of group rank `root`; on other ranks x defines shape and dtype and is overwritten."""
        ...

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send parts[j] [m_j, …] to group rank j; part j of the result comes from rank j."""
        ...


class Alone:
    """A group of one rank."""

    size = 1
    index = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """[x]."""
        return [x]

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """x."""
        return x

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The part itself."""
        return list(parts)


class DistGroup:
    """torch.distributed: gloo on CPUs, NCCL on GPUs, on one or more hosts."""

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        self.process_group: Any = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
        self._ranks = list(ranks)
        self.size = len(ranks)
        self.index = ranks.index(dist.get_rank()) if dist.get_rank() in ranks else -1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's x, in place where x is contiguous."""
        x = x.contiguous()
        dist.all_reduce(x, group=self.process_group)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.process_group)
        return parts

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """The root's x."""
        x = x.contiguous()
        dist.broadcast(x, self._ranks[root], group=self.process_group)
        return x

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Exchange row counts, then rows. gloo has no all-to-all, so it sends and receives in pairs."""
        counts = torch.stack(self.all_gather(torch.tensor([len(p) for p in parts])))[:, self.index].tolist()
        out = [parts[0].new_empty(n, *parts[0].shape[1:]) for n in counts]
        out[self.index] = parts[self.index]
        pending = []
        for peer, rank in enumerate(self._ranks):
            if peer != self.index:
                if len(parts[peer]):
                    pending.append(dist.isend(parts[peer].contiguous(), rank, group=self.process_group))
                if counts[peer]:
                    pending.append(dist.irecv(out[peer], rank, group=self.process_group))
        for work in pending:
            if work is not None:
                work.wait()
        return out
