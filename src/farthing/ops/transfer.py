"""Asynchronous copies between a device and the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostCopies:
    """One step's tensors on the host."""

    tensors: Mapping[str, Tensor]
    done: Any = None  # a CUDA event

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, after waiting for its copy."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensors[name]


class HostTransfer:
    """Pinned memory and asynchronous copies on CUDA; plain clones on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._pinned: dict[str, Tensor] = {}
        self._side: Any = None

    def to_host(self, **tensors: Tensor) -> HostCopies:
        """Queue copies to the host. They precede whatever the device computes next."""
        if not self._cuda:  # the device may overwrite the tensors while the host reads
            return HostCopies({name: t.clone() for name, t in tensors.items()})
        copies = {name: self._buffer(name, t).copy_(t, non_blocking=True) for name, t in tensors.items()}
        done = torch.cuda.Event()
        done.record()
        return HostCopies(copies, done)

    def to_device(self, x: Tensor) -> Tensor:
        """Copy to the device. A later `to_host` has already waited for the previous use of the buffer."""
        if not self._cuda:
            return x
        return self._buffer("to_device", x).copy_(x).to(self._device, non_blocking=True)

    def indices(self, rows: NDArray[np.int64]) -> Tensor:
        """Row indices on the device."""
        return torch.from_numpy(rows).to(self._device, non_blocking=True)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run copies of weights on a separate stream; they are complete when the block ends."""
        if not self._cuda:
            yield
            return
        self._side = self._side or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._side):
            yield
        self._side.synchronize()

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """A pinned buffer with the tensor's shape, reused across calls and grown when too small."""
        buffer = self._pinned.get(name)
        if buffer is None or buffer.numel() < like.numel() or buffer.dtype != like.dtype:
            buffer = self._pinned[name] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
        return buffer[: like.numel()].view(like.shape)
