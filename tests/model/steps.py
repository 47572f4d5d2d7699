"""Steps of a model that keeps states: results do not depend on what blocks and slots held before."""

from __future__ import annotations

import torch

from farthing.model.decoder import DecoderModel
from farthing.ops.api import CacheDtype
from farthing.ops.torch_util import make_batch


def logits_of(model: DecoderModel, ids: torch.Tensor, dtype: CacheDtype = "float32") -> torch.Tensor:
    """Logits of a prompt in two chunks, a step of two sequences, and a step of one, over scattered blocks and
    slots that held other sequences."""
    length = len(ids)
    block = length // 8 + 2
    cache = model.new_cache(2 * block, 8, dtype, slots=3)
    kept = cache.state or cache.open
    assert kept is not None
    for each in kept.tensors():
        each += torch.nan
    first, second = list(reversed(range(block))), list(range(block, block + 4))
    parts = [
        (ids[: length - 6], make_batch([length - 6], [0], [first], 8, [2])),
        (ids[:9], make_batch([4, 5], [length - 6, 0], [first, second], 8, [2, 0])),
        (ids[:3], make_batch([1, 2], [length - 2, 5], [first, second], 8, [2, 0])),
        (ids[:1], make_batch([1], [length - 1], [first], 8, [2])),
    ]
    with torch.inference_mode():
        return torch.cat([model.logits(model.forward(part, batch, cache)).float() for part, batch in parts])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative."""
    return float((a - b).norm() / b.norm())
