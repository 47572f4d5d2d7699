"""What fits the memory of this machine, before anything is loaded: weights, and the rest that suits them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from farthing.checkpoint.gguf import INDEX
from farthing.checkpoint.reader import has_weights, method_of, read_config
from farthing.config import Quantization
from farthing.memory import gigabytes
from farthing.model.config import ModelConfig
from farthing.parallel.plan import Layout, ShardPlan
from farthing.planner.buffers import Serving
from farthing.planner.footprint import (
    Holder,
    StoredOf,
    quantization_of,
    stored_by_checkpoint,
    stored_by_config,
)
from farthing.planner.memory import PlannedModel, RankMemory, memory
from farthing.process import cache_dir

_ROOM = 3  # times the packed file: free disk for which one is kept
SMALL = 8  # times the files: memory of which no format needs more


def certainly_fits(path: Path, free: int) -> bool:
    """Whether the files are so small that nothing has to be computed."""
    files = [file.stat().st_size for file in path.glob("*.safetensors")] if has_weights(path) else []
    return bool(files) and SMALL * sum(files) <= free


def weight_bytes(path: Path, quantization: str | None = None, sizes: tuple[int, int, int] = (1, 1, 1)) -> int:
    """Bytes of all ranks' weights as CPU kernels hold them, by the files' headers or else by config.json."""
    serving = Serving(cache_tokens=0, max_model_len=1, max_num_batched_tokens=1, max_num_seqs=1)
    return sum(rank.weights for rank in needed(path, quantization, serving, sizes))


def needed(
    path: Path,
    quantization: str | None,
    serving: Serving,
    sizes: tuple[int, int, int] = (1, 1, 1),
    halves: int | None = None,
) -> list[RankMemory]:
    """The memory of each rank on a CPU. sizes: tp, pp, ep; halves: of a `Holder`."""
    plan, model = _planned(path, Layout(*sizes))
    return memory(model, plan, Holder("cpu", 4, quantization, halves), serving)


def _planned(path: Path, layout: Layout) -> tuple[ShardPlan, PlannedModel]:
    raw = read_config(path)
    stored: StoredOf = stored_by_checkpoint(path) if has_weights(path) else stored_by_config(raw)
    plan = ShardPlan.build(ModelConfig.from_json(raw), layout)
    return plan, PlannedModel.of(plan, stored)


def worth_packing(path: Path, weights: int) -> bool:
    """Whether a packed file of so many bytes is kept in the user's cache directory by default: of no GGUF
    file, which is nearly packed already, and only where the disk has ample room."""
    try:
        place = cache_dir()
    except RuntimeError:  # no home directory
        return False
    free = shutil.disk_usage(next(each for each in (place, *place.parents) if each.exists())).free
    return free > _ROOM * weights and not (path / INDEX).is_file()


# `--fit`: the format, the context and the cache that suit the model and the memory.

_USABLE = 0.9  # of the available memory
_AS_STORED = 10**9  # bytes of weights up to which rounding them would save little time
_LEAST = 8_192  # tokens of context for which weights are rounded further, and sequences given up
_SEQUENCES = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class Fit:
    """Options of `farthing serve` on a CPU, named as there, and the bytes that result."""

    quantization: Quantization | None
    max_model_len: int
    max_num_seqs: int
    kv_cache_memory: int
    stored: str  # method of the files
    longest: int  # context of the model
    weights: int
    available: int

    def __str__(self) -> str:
        rounded = f"{self.stored} rounded to {self.quantization}" if self.quantization else self.stored
        context = f"{self.max_model_len:,}"
        context += "" if self.max_model_len == self.longest else f" of {self.longest:,}"
        weights = gigabytes(self.weights) if self.weights > 10**8 else f"{self.weights / 1e6:.0f} MB"
        return (
            f"weights {rounded}, {weights}; context {context} tokens; cache "
            f"{gigabytes(self.kv_cache_memory)} for up to {self.max_num_seqs} sequences; "
            f"{gigabytes(self.available)} of memory are available"
        )


def fit(
    path: Path,
    available: int,
    quantization: Quantization | None = None,
    halves: int | None = None,
    sequences: int = _SEQUENCES[0],
) -> Fit:
    """The options with which a model suits the memory, by its files or else by config.json.

    Weights of 1 GB and more are rounded to int8, which costs 0.1 % of perplexity and halves the bytes of
    a token; to int4 where that is what leaves room for 8,192 tokens. Then the context is as long, and the
    sequences are as many, as the rest has room for. quantization: the only rounding to try. halves: of a
    `Holder`. sequences: the most.

    Raises ValueError if nothing fits.
    """
    plan, model = _planned(path, Layout())
    longest = plan.config.max_position_embeddings
    method = method_of(quantization_of(read_config(path)))
    stored = next(s.kind for _, s in model.matrices) if method in ("dense", "gguf") else method

    def at(kind: str | None, context: int, tokens: int, sequences: int) -> RankMemory:
        serving = Serving(tokens, context, max_num_seqs=sequences)
        return memory(model, plan, Holder("cpu", 4, kind, halves), serving)[0]

    usable, kinds = int(_USABLE * available), _formats(model, quantization, at(None, 1, 0, 1).weights)
    lengths = [longest, *(2**n for n in range(30, 8, -1) if 2**n < longest)]
    for least in (min(_LEAST, longest), lengths[-1]):
        for kind in kinds:
            for n in (sequences, *(s for s in _SEQUENCES if s < sequences)):
                if at(kind, least, least, n).total > usable:
                    continue
                context = next(length for length in lengths if at(kind, length, length, n).total <= usable)
                whole = at(kind, context, context, n)
                most = at(kind, context, context * n, n).cache
                cache = max(whole.cache, min(most, (usable - whole.total) // 4 + whole.cache))
                return Fit(kind, context, n, cache, stored, longest, whole.weights, available)
    smallest = at(kinds[-1], lengths[-1], lengths[-1], 1)
    raise ValueError(
        f"model: {path.name} needs {gigabytes(smallest.total)} even with "
        f"{kinds[-1] or stored} weights and a context of {lengths[-1]} tokens, and {gigabytes(available)} "
        "are available; expected a smaller model"
    )


def _formats(model: PlannedModel, given: Quantization | None, weights: int) -> list[Quantization | None]:
    """The formats to try, the best first."""
    if given is not None:
        return [given]
    order = cast("list[Quantization | None]", ["int8", "int4"])
    rounded = [k for k in order if any(Holder("cpu", 4, k).rounds(s) for _, s in model.matrices)]
    return [None, *rounded] if weights <= _AS_STORED or not rounded else rounded
