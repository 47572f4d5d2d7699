"""Collectives among the ranks of one group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """Ranks that compute one thing together."""

    size: int
    index: int  # of this rank within the group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's x; may write into x."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x (equal shapes), in the order of the group."""
        ...


class Alone:
    """A group of one."""

    size = 1
    index = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """[x]."""
        return [x]


class DistGroup:
    """torch.distributed: gloo on CPUs, NCCL on GPUs, over one machine or many."""

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        self._group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
        self.size = len(ranks)
        self.index = ranks.index(dist.get_rank()) if dist.get_rank() in ranks else -1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's x, in place where x is contiguous."""
        x = x.contiguous()
        dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return parts
