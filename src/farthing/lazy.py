"""torch, numpy and the optional gguf, imported on first use.

Importing torch takes 0.8 s and 190 MB, and serving a packed model on a CPU does not need it; numpy takes 0.07
s, and `farthing plan` does not need it. Modules on those paths import them from here, and `Tensor` and
`NDArray` only for type checking.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["gguf", "np", "torch"]

if TYPE_CHECKING:
    import gguf as gguf
    import numpy as np
    import torch as torch
else:

    class _Module:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(import_module(self._name), attribute)
            setattr(self, attribute, value)  # found at once next time
            return value

    gguf, np, torch = _Module("gguf"), _Module("numpy"), _Module("torch")
