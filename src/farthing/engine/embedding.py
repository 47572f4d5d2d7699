"""Embeddings: the hidden state of a text's last token, of length one, as Qwen3-Embedding is trained for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farthing.checkpoint.shards import read_json
from farthing.engine.request import SamplingParams

PROBE = partial(SamplingParams, max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
HIDDEN = PROBE(probe="hidden")


def check_pooling(model: str) -> None:
    """Raises ValueError for a model whose embeddings are not those of the last token."""
    file = Path(model) / "1_Pooling" / "config.json"
    if not file.is_file():
        return
    pooling = read_json(file)
    if not pooling.get("pooling_mode_lasttoken"):
        used = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value is True]
        raise ValueError(
            f"the model pools by {', '.join(used) or 'another way'}; expected pooling_mode_lasttoken"
        )


def check_dimensions(dimensions: int | None, width: int) -> None:
    """Raises ValueError for more than the model has."""
    if dimensions is not None and not 1 <= dimensions <= width:
        raise ValueError(f"dimensions: got {dimensions}; expected at most {width}")


def embeddings(states: Sequence[NDArray[np.float32]], dimensions: int | None) -> NDArray[np.float32]:
    """Hidden states, each [D], as embeddings [n, dimensions] of length one."""
    vectors = np.stack(states)[:, :dimensions].astype(np.float64)
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found: NDArray[np.float32] = (vectors / norms).astype(np.float32)
    return found
