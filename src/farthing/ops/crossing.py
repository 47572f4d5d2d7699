"""Copies between a device and the host that nobody waits for before they are wanted."""

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
class Copies:
    """A step's tensors on the host."""

    tensors: Mapping[str, Tensor]
    arrived: Any = None  # a CUDA event

    def __getitem__(self, name: str) -> Tensor:
        """Once it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors[name]


class Crossing:
    """Between host and device: pinned memory and asynchronous copies on CUDA, nothing to do on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._pinned: dict[str, Tensor] = {}
        self._side: Any = None

    def down(self, **tensors: Tensor) -> Copies:
        """To the host. Queued before what the device computes next, and so done before it."""
        if not self._cuda:  # the device may overwrite them while the host reads
            return Copies({name: t.clone() for name, t in tensors.items()})
        copies = {name: self._room(name, t).copy_(t, non_blocking=True) for name, t in tensors.items()}
        arrived = torch.cuda.Event()
        arrived.record()
        return Copies(copies, arrived)

    def up(self, x: Tensor) -> Tensor:
        """To the device. What was copied up before has been waited for by the `down` since."""
        if not self._cuda:
            return x
        return self._room("up", x).copy_(x).to(self._device, non_blocking=True)

    def index(self, rows: NDArray[np.int64]) -> Tensor:
        """Row numbers on the device."""
        return torch.from_numpy(rows).to(self._device, non_blocking=True)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Copies of weights on a stream of their own; they are there when the block ends."""
        if not self._cuda:
            yield
            return
        self._side = self._side or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._side):
            yield
        self._side.synchronize()

    def _room(self, name: str, like: Tensor) -> Tensor:
        """Pinned memory of a tensor's shape; it is kept and grows."""
        held = self._pinned.get(name)
        if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
            held = self._pinned[name] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
        return held[: like.numel()].view(like.shape)
