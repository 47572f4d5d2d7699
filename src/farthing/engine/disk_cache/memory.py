"""The bytes of one block over all layers, in file order: latents, their scales, then index keys.

Each tensor is stored layer by layer; MTP layers come last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from farthing.engine.disk_cache.segment import Pieces
from farthing.lazy import torch
from farthing.ops import LatentCache

if TYPE_CHECKING:
    from torch import Tensor


class BlockMemory:
    """Blocks of a cache in this process's memory; files are read and written in place."""

    def __init__(self, cache: LatentCache) -> None:
        self._parts = []  # per tensor: memory, bytes of a block, offset of block 0 in each layer
        for tensor in cache.tensors():
            whole = _bytes(tensor)
            layers, blocks = tensor.shape[:2]
            size = len(whole) // (layers * blocks)
            self._parts.append((whole, size, [layer * blocks * size for layer in range(layers)]))
        self.block_bytes = sum(size * len(layers) for _, size, layers in self._parts)

    def source(self, block: int) -> Pieces:
        """The memory of a block to write to a file."""
        return [
            whole[first + block * size : first + (block + 1) * size]
            for whole, size, layers in self._parts
            for first in layers
        ]

    def target(self, block: int) -> tuple[Pieces, Callable[[], None]]:
        """Memory to read a block into, and a function that completes the read."""
        return self.source(block), lambda: None


class DeviceMemory(BlockMemory):
    """Blocks of a cache on an accelerator, copied through host memory.

    The copies are queued on the device's default stream, so they follow the steps launched before them and
    precede those launched after.
    """

    def __init__(self, cache: LatentCache) -> None:
        self._tensors = cache.tensors()
        self.block_bytes = sum(t[:, 0].numel() * t.element_size() for t in self._tensors)

    def source(self, block: int) -> Pieces:
        """See `BlockMemory`."""
        return [_bytes(t[:, block].cpu()) for t in self._tensors]

    def target(self, block: int) -> tuple[Pieces, Callable[[], None]]:
        """See `BlockMemory`."""
        hosts = [torch.empty(t[:, block].shape, dtype=t.dtype) for t in self._tensors]

        def complete() -> None:
            for tensor, host in zip(self._tensors, hosts, strict=True):
                tensor[:, block] = host.to(tensor.device)

        return [_bytes(host) for host in hosts], complete


def memory_of(cache: LatentCache) -> BlockMemory:
    """The accessor for a cache's blocks, on the host or a device."""
    on_host = isinstance(cache.data, np.ndarray) or cache.data.device.type == "cpu"
    return (BlockMemory if on_host else DeviceMemory)(cache)


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1)
    return (flat if isinstance(flat, np.ndarray) else flat.view(torch.uint8).numpy()).view(np.uint8).data
