"""Loading and comparing models for the accuracy gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from farthing.checkpoint import Checkpoint
from farthing.compress.corpus import Corpus
from farthing.compress.evaluate import Baseline, Comparison, compare_with, remember
from farthing.compress.simulate import SimulatedOps
from farthing.config import Quantization
from farthing.model import DecoderModel, ModelConfig, load
from farthing.ops import Ops, select
from farthing.ops.select import known_backends


def held_out_sample() -> Path:
    """File of the embedded model's held-out text."""
    return Path(__file__).parents[1] / "assets" / "mite" / "heldout.jsonl"


def parse_share(name: str, text: str) -> float:
    """'0.3%' or '0.003' -> 0.003. Raises ValueError naming the option."""
    value = text.strip()
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 10:
        raise ValueError(f"{name}: got {text!r}; expected a share such as 0.3% or 0.003")
    return share


def load_for(
    path: Path, backend: str = "auto", simulate: bool = False, quantization: Quantization | None = None
) -> DecoderModel:
    """Load a model on a serving backend, which may round dense weights, or in float32 with simulated
    activation rounding."""
    if quantization is not None:
        return load(path, select(backend, quantization=quantization))
    return load(path, _ops(path, "simulate" if simulate else backend))


def compare_in_turn(
    a: Path,
    b: Path,
    corpus: Corpus,
    backends: tuple[str, str] = ("auto", "auto"),
    progress: Callable[[int], None] | None = None,
    quantization: Quantization | None = None,
) -> Comparison:
    """Compare B with A, with one model in memory at a time; A's hidden states, norm and head are kept.

    backends: of A and B; "simulate" is one. progress: called with tokens, twice the corpus in total.
    quantization: of B's dense weights while loading.
    """
    base = baseline(a, corpus, backends[0], progress)
    judged = load_for(b, backends[1], quantization=quantization)
    return compare_with(base, judged, corpus, progress=progress)


def baseline(
    path: Path, corpus: Corpus, backend: str = "auto", progress: Callable[[int], None] | None = None
) -> Baseline:
    """Hidden states, norm and head of the model at `path`, to compare other models with it."""
    hidden = remember(load_for(path, backend), corpus, progress=progress)
    return Baseline(hidden, _tail(path, backend))


def _tail(path: Path, backend: str) -> DecoderModel:
    """A model with only the norm and head."""
    checkpoint = Checkpoint.open(path)
    config = replace(
        ModelConfig.from_json(checkpoint.config),
        num_hidden_layers=0,
        num_nextn_predict_layers=0,
        layer_sizes=(),
    )
    return DecoderModel(config, _ops(path, backend), checkpoint, first=False)


def check_backend(backend: str) -> None:
    """Raise unless `backend` is "simulate" or runs on this machine."""
    if backend == "simulate":
        return
    known = sorted({*known_backends(), "simulate"})
    if backend != "auto" and backend.partition("/")[0] not in known:
        raise ValueError(f"backend: got {backend!r}; expected 'auto' or one of {known}")
    select(backend)


def _ops(path: Path, backend: str) -> Ops:
    return SimulatedOps(path) if backend == "simulate" else select(backend)
