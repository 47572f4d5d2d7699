"""torch, imported on first use.

Importing it takes 0.8 s and 190 MB, and serving a packed model on a CPU does not need it. Modules on that
path import it from here, and `Tensor` only for type checking.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Module:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(import_module(self._name), attribute)
            setattr(self, attribute, value)  # found at once next time
            return value

    torch = _Module("torch")
