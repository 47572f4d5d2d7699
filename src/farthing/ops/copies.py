"""Device copies of the parameters that a model keeps in host memory, such as norms and the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DeviceCopies:
    """Copies on one device, each made once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the host tensor, which is kept alive

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it is on the device, else its copy there."""
        if tensor.device.type == self._device.type:
            return tensor
        kept = self._copies.get(id(tensor))
        if kept is None:
            kept = self._copies[id(tensor)] = (tensor, tensor.to(self._device))
        return kept[1]
