"""Memory and disk that a compression takes, compared with what is free before it begins."""

from __future__ import annotations

import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from math import prod
from pathlib import Path

from farthing.checkpoint.reader import Checkpoint
from farthing.compress.recipe import Recipe
from farthing.compress.sensitivity import ROWS, SAMPLE
from farthing.memory import available_memory, gigabytes
from farthing.model import ModelConfig, Parameters

Shapes = Iterable[tuple[str, tuple[int, ...]]]  # of tensors, by name

log = logging.getLogger(__name__)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_COPIES = (
    2  # of a layer in float32: the layer, and as much again in 16 bits, in rounding and in pages not returned
)
_FACTORED = 5  # arrays of the size of second moments while they are factored
_DISTRIBUTIONS = 5  # of the model and of one with a rounded layer, and between them
_PROGRAM = 1 << 30  # bytes of Python, torch and buffers


def check_needs(checkpoint: Checkpoint, out: Path, recipe: Recipe, expected: int | None) -> None:
    """Log what the run takes, and raise ValueError if that is more than is free.

    expected: bytes of the result; None: at most the source's.
    """
    done = sum(file.stat().st_size for file in out.glob("*.safetensors")) if out.is_dir() else 0
    written = (expected or checkpoint.stored_bytes()) - done
    disk = free_disk(out)
    log.info("the result takes about %s", gigabytes(written))
    if written > disk:
        raise ValueError(
            f"out: the result takes about {gigabytes(written)}, and {gigabytes(disk)} are free; expected a "
            "directory on another disk, or --no-check-memory"
        )
    config = ModelConfig.from_json(checkpoint.config)
    shapes = ((name, checkpoint.shape(name)) for name in checkpoint.names())
    check_memory(config, shapes, recipe)


def check_memory(config: ModelConfig, shapes: Shapes, recipe: Recipe) -> None:
    """Log the memory that the run takes, and raise ValueError if that is more than is available."""
    memory, free = memory_needed(shapes, config, recipe), available_memory()
    log.info("memory takes about %s", gigabytes(memory))
    if memory > free:
        raise ValueError(
            f"model: compressing its largest layer takes about {gigabytes(memory)} of memory, and "
            f"{gigabytes(free)} are available; expected more memory, a recipe without second moments such as "
            "int4-rtn, or --no-check-memory"
        )


def memory_needed(shapes: Shapes, config: ModelConfig, recipe: Recipe) -> int:
    """The most bytes at a time, with a tenth to spare: the largest layer, its inputs' moments, the hidden
    states and the embedding."""
    weights: dict[str, int] = defaultdict(int)
    inputs: dict[str, dict[str, int]] = defaultdict(dict)
    parameters = Parameters(config)
    for name, shape in shapes:
        layer = _LAYER.search(name)
        if layer and name.endswith(("weight", "weight_packed")):
            packed = 8 if name.endswith("weight_packed") else 1
            weights[layer[1]] += prod(shape) * packed
            if len(shape) == 2:
                inputs[layer[1]][parameters.reads(name.rpartition(".")[0])] = shape[1] * packed
    gram = recipe.needs_data and recipe.needs_gram

    def of_layer(index: str) -> float:
        squares = [k * k for k in inputs[index].values()] if gram else []
        more = _FACTORED * max(squares, default=0)  # while rounding, when no matrix has a copy in 16 bits
        return 4 * (weights[index] + max((_COPIES - 1) * weights[index], more) + sum(squares))

    most = max(map(of_layer, weights), default=0.0)
    hidden = 4 * 3 * recipe.calibration_tokens * config.state_width if recipe.needs_data else 0
    if recipe.scheme == "auto":  # a layer beside its rounded copy; the states of the judged text; the head
        states = 4 * 3 * SAMPLE * (config.num_hidden_layers + 1) * config.state_width
        head = 4 * config.vocab_size * (config.hidden_size + _DISTRIBUTIONS * ROWS)
        most = max(most + 4 * max(weights.values(), default=0), head) + states
    embedding = 4 * config.vocab_size * config.hidden_size
    return round(1.1 * (most + hidden + embedding + _PROGRAM))


def free_disk(path: Path) -> int:
    """Free bytes of the disk on which `path` is or will be."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free
