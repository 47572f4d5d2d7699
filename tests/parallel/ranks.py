"""Rank options of a layout, for the tests of this directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farthing.config import EngineConfig
from farthing.parallel.plan import Layout
from farthing.parallel.worker import RankOptions


def rank_options(path: Path, layout: Layout, **options: Any) -> RankOptions:
    """Reference ops in float32 unless `options` say otherwise, one thread per rank."""
    defaults: dict[str, Any] = dict(backend="reference", dtype="float32", threads=1) | options
    sizes: dict[str, Any] = dict(
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        expert_parallel_size=layout.ep,
        dp_attention=layout.dp_attention,
        enable_prefix_caching=not layout.dp_attention,
    )
    return RankOptions(path, EngineConfig(**defaults, **sizes))
