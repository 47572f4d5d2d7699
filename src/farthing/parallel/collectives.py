"""Collectives over one group of ranks, and the one-shot all-reduce over NVLink."""

from __future__ import annotations

import importlib.util
import logging
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


log = logging.getLogger(__name__)
SLOT_BYTES = 256 << 10  # above this size NCCL's ring moves fewer bytes
MOST_RANKS = 8  # each rank reads all others' data
_BLOCK = 1024


def fastest(group: DistGroup, device: torch.device) -> Group:
    """The group with one-shot all-reduce if all its ranks support it; else the NCCL group itself.

    All ranks of the group must call it. The reason for a fallback is logged.

    The ranks of one host register a buffer with each other (torch's symmetric memory). An all-reduce copies
    its input to a slot of the local buffer and waits in a device barrier; then one Triton kernel sums the
    slots of all ranks in rank order, so that every rank gets the same bits. Two slots alternate: passing the
    barrier of call s means that all peers have finished reading call s - 1, so the slot of s + 1 is free.

    This serves the small, latency-bound sums of decoding. Larger sums, other collectives, and ranks that
    cannot map each other's memory use NCCL.
    """
    problem = unsuitable(group.size, device)
    if not _agree(group, problem is None):
        log.info("all-reduce through NCCL: %s", problem or "another rank cannot map its peers' memory")
        return group
    candidate: Group | None = None
    try:
        candidate = SymmetricGroup(group, device)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    if not _agree(group, candidate is not None) or candidate is None:
        log.warning("all-reduce through NCCL: %s", problem or "another rank cannot map its peers' memory")
        return group
    return candidate


def unsuitable(size: int, device: torch.device) -> str | None:
    """Why ranks on this host cannot read each other's memory; None if they can."""
    if device.type != "cuda":
        return f"ranks compute on {device.type}"
    if size > MOST_RANKS:
        return f"{size} ranks exceed {MOST_RANKS}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    own, count = torch.cuda.current_device(), torch.cuda.device_count()
    far = [i for i in range(count) if i != own and not torch.cuda.can_device_access_peer(own, i)]
    return f"GPU {own} cannot read the memory of GPU {far[0]}" if far else None


def _agree(group: DistGroup, able: bool) -> bool:
    """Whether all ranks are able."""
    return all(bool(t) for t in group.all_gather(torch.tensor([int(able)])))


class SymmetricGroup:
    """`group` with its own all-reduce."""

    def __init__(self, group: DistGroup, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._group, self.size, self.index = group, group.size, group.index
        self._buffer = symmetric.empty(2 * SLOT_BYTES, dtype=torch.uint8, device=device)
        self._peers: Any = symmetric.rendezvous(self._buffer, group.process_group)
        self._pointers = torch.tensor(list(self._peers.buffer_ptrs), dtype=torch.int64, device=device)
        self._calls = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's x, in place where x is contiguous; the same bits on every rank."""
        size = x.numel() * x.element_size()
        if not x.is_cuda or size > SLOT_BYTES:
            return self._group.all_reduce(x)
        x = x.contiguous()
        start = (self._calls & 1) * SLOT_BYTES
        self._calls += 1
        self._buffer[start : start + size].view(x.dtype).copy_(x.view(-1))
        self._peers.barrier()
        add_up(self._pointers, start, x)
        if torch.cuda.is_current_stream_capturing():
            self._peers.barrier()  # a replayed graph may start with the slot it ended with
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """NCCL's."""
        return self._group.all_gather(x)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """NCCL's."""
        return self._group.broadcast(x, root)

    def all_to_all(self, parts: Any) -> list[Tensor]:
        """NCCL's."""
        return self._group.all_to_all(parts)


def add_up(pointers: Tensor, start: int, out: Tensor) -> None:
    """out [...] = sum over ranks of the tensors of out's type and shape, `start` bytes after each pointer.

    pointers [ranks] int64, on the device. Accumulates in float32, in rank order.
    """
    from farthing.parallel.symmetric_kernel import one_shot

    n = out.numel()
    first = start // out.element_size()
    one_shot[(-(-n // _BLOCK),)](pointers, out, n, first, RANKS=len(pointers), BLOCK=_BLOCK)
