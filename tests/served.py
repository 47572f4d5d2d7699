"""Random models as `farthing serve` holds one by default: mapped from a packed file, with arrays of numpy as
tensors, in one thread of the CPU's kernels; with tensors of torch where the server or a test needs them."""

from __future__ import annotations

import atexit
import os
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from farthing.config import EngineConfig
from farthing.engine.build import runs_on_arrays
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import model_of, random_model
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource
from farthing.ops.api import no_gradients
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch

_PACKED: dict[str, Path] = {}
_CONFIGS: WeakKeyDictionary[DecoderModel, tuple[ModelConfig, int, str | None]] = WeakKeyDictionary()


def served_model(
    config: ModelConfig, seed: int = 7, dtype: str | None = None, arrays: bool | None = None
) -> DecoderModel:
    """A new model. dtype: of the cache, as `--dtype` sets it. arrays: None: as the server decides."""
    arrays = runs_on_arrays(config) if arrays is None else arrays
    key = f"{seed} {config}"
    if key not in _PACKED:
        handle, name = tempfile.mkstemp(suffix=".packed", dir=os.environ["XDG_CACHE_HOME"])
        os.close(handle)
        random_model(config, select("cpu", threads=1), seed).ops.save_packed(name)
        _PACKED[key] = Path(name)
    parameters: dict[str, Any] = dict(random_parameters(config, seed))
    if arrays:
        parameters = {name: value.numpy() for name, value in parameters.items()}
    kind: Any = dtype if arrays or dtype is None else getattr(torch, dtype)
    ops = select("cpu", kind, 1, packed=str(_PACKED[key]), arrays=arrays)
    model = model_of(config, ops, MemorySource(parameters))
    assert model.ops.arrays == arrays and model.ops.packed_from is not None
    _CONFIGS[model] = config, seed, dtype
    return model


def form_for(model: DecoderModel, config: EngineConfig) -> DecoderModel:
    """The same model with tensors of torch where the configuration needs them: for drafts of an MTP layer."""
    return _with_torch(model) if model.ops.arrays and "mtp" in (config.speculate or "") else model


@cache
def _with_torch(model: DecoderModel) -> DecoderModel:
    config, seed, dtype = _CONFIGS[model]
    found = served_model(config, seed, dtype, arrays=False)
    found.ops.source = model.ops.source
    return found


atexit.register(_with_torch.cache_clear)  # nanobind reports native weights that outlive the interpreter


def next_logits(model: DecoderModel, tokens: list[int]) -> torch.Tensor:
    """Logits [V] after `tokens`, from one pass over all of them, without an engine."""
    cache = model.new_cache(num_blocks=32, block_size=16, dtype=model.ops.cache_dtype)
    count = len(tokens)
    batch = make_batch([count], [0], [list(range(-(-count // 16)))], 16)
    if model.ops.arrays:
        held = {name: getattr(batch, name) for name in batch.__slots__}
        batch = replace(batch, **{n: v.numpy() for n, v in held.items() if isinstance(v, torch.Tensor)})
    with no_gradients(model.ops):
        hidden = model.forward(model.ops.tensor(np.array(tokens)), batch, cache)
        return torch.as_tensor(model.logits(hidden[-1:]))[0]
