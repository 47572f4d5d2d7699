"""Farthing: DeepSeek-V3/R1-class mixture-of-experts models at the lowest cost per token."""

from __future__ import annotations

import gc
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farthing.engine.request import RequestOutput, SamplingParams, StructuredOutputsParams
    from farthing.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]

# Imported when first used: `farthing --help` must not wait for torch.
_LAZY = {
    "LLM": "farthing.llm",
    "RequestOutput": "farthing.engine.request",
    "SamplingParams": "farthing.engine.request",
    "StructuredOutputsParams": "farthing.engine.request",
}


def import_whole(name: str) -> ModuleType:
    """Import a module that brings torch, without looking for garbage meanwhile.

    What libraries make when they are imported stays; searching it again and again is 5 to 10 % of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        if collecting:
            gc.enable()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'farthing' has no attribute {name!r}")
    return getattr(import_whole(_LAZY[name]), name)
