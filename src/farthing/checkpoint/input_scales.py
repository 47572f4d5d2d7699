"""Calibrated input scales (`input_scale`), shared by all matrices that read the same tensor.

Kernels quantize a tensor once for all its readers: gate and up projection, the stacked query and latent
projections, and the routed experts of a layer, which all read the layer's normed hidden states. If a file
gives such siblings different scales, the largest is used, so that no range is clipped more than specified.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from farthing.checkpoint.error import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".input_scale"
_EXPERT = re.compile(r"\.experts\.\d+\.(gate|up)_proj$")
_SIBLINGS = {
    "gate_proj": "gate_up", "up_proj": "gate_up",
    "q_a_proj": "qkv_a", "q_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a",
    "k_proj": "qkv_a", "v_proj": "qkv_a",
}  # fmt: skip


def shared_input(module: str) -> str:
    """A name for the tensor a module reads, equal for all modules that read it."""
    if _EXPERT.search(module):
        return _EXPERT.sub(".experts.*.gate_up", module)
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_SIBLINGS.get(leaf, leaf)}"


class InputScales:
    """Scales by module, read on first use."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._known: dict[str, float] = {}
        self._sharing: dict[str, list[str]] = {}
        for name in names:
            if name.endswith(SUFFIX):
                self._sharing.setdefault(shared_input(name.removesuffix(SUFFIX)), []).append(name)

    def __getitem__(self, module: str) -> float:
        """The scale of a module's input. Raises CheckpointError without the file; the reader adds it."""
        key = shared_input(module)
        if key not in self._known:
            if f"{module}{SUFFIX}" not in self._sharing.get(key, ()):
                raise CheckpointError("input_scale is missing, but input_activations are static")
            self._known[key] = max(self._one(name) for name in self._sharing[key])
        return self._known[key]

    def _one(self, name: str) -> float:
        tensor = self._read(name)
        value = float(tensor) if tensor.numel() == 1 else float("nan")
        if not 0 < value < float("inf"):
            raise CheckpointError(
                f"input_scale: found {tensor.flatten()[:4].tolist()}; expected one number > 0"
            )
        return value
