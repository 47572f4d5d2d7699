"""What a compression will take: time from a short measured piece and the shapes, memory and disk.

Legend: T calibration tokens; H heads; N rows and K columns of a matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from farthing.compress.export import Stored, expected_bytes, for_export
from farthing.compress.layer import Matrix, TracedOps, bfloat16_products
from farthing.compress.native import short_products
from farthing.compress.needs import free_disk, memory_needed
from farthing.compress.recipe import Recipe
from farthing.compress.sensitivity import FORMATS, SAMPLE
from farthing.compress.source import PlainCheckpoint
from farthing.compress.transform import round_piece
from farthing.memory import available_memory
from farthing.model import ModelConfig, Parameters, parameter_shapes
from farthing.ops import SILU
from farthing.ops.weights import Format

_ROWS, _SIDE = 1024, 2048  # of the measured matrix
_TOKENS = 1024  # of the measured inputs
_FEW = 16  # rows whose rounding takes no time compared with that of the factors
_PARTS = 8  # of a layer that the automatic plan judges apart, about


@dataclass(frozen=True, slots=True)
class Work:
    """Operations by kind, or seconds per operation of each kind."""

    products: float = 0.0  # N K of every token: inputs times matrices
    attention: float = 0.0  # H times a key's width, of every token and every key it sees: scores and values
    moments: float = 0.0  # K^2 of every token
    factors: float = 0.0  # K^3
    sorting: float = 0.0  # K^2, of moments before and after they are factored
    rounding: float = 0.0  # N K^2, or N K _SIDE without second moments

    def seconds(self, rates: Work) -> float:
        """The time at these rates."""
        return float(sum(getattr(self, f.name) * getattr(rates, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a compression will take."""

    layer_seconds: list[float]
    gate_seconds: float
    memory: int
    free_memory: int
    disk: int | None  # of the result; None if a plan decides
    free_disk: int

    def to_json(self) -> dict[str, Any]:
        """As JSON-serializable values."""
        seconds = sum(self.layer_seconds) + self.gate_seconds
        own = asdict(self) | {"layer_seconds": [round(each, 1) for each in self.layer_seconds]}
        return {"hours": round(seconds / 3600, 3), "seconds": seconds} | own

    def __str__(self) -> str:
        """As sentences."""
        layers, judged = self.layer_seconds, self.gate_seconds

        def taken(seconds: float) -> str:
            return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(seconds, 1) / 60:.1f} minutes"

        def size(count: int) -> str:
            return f"{count / 1e9:.2f} GB"

        result = "a result whose size its plan decides" if self.disk is None else f"{size(self.disk)} of disk"
        compared = f"{taken(judged)} for the comparison with the source" if judged else "no comparison"
        lines = (
            f"Compression takes about {taken(sum(layers) + judged)} on this machine: {len(layers)} layers of "
            f"up to {taken(max(layers))}, and {compared}.",
            f"It needs {size(self.memory)} of memory ({size(self.free_memory)} are available) and {result} "
            f"({size(self.free_disk)} are free).",
        )
        return "\n".join(lines)


class Shapes:
    """A model of which only config.json is known, in 16 bits."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = dict(parameter_shapes(config))

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._shapes)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._shapes[name]

    def nbytes(self, name: str) -> int:
        """Of a tensor."""
        return 2 * prod(self._shapes[name])

    def stored_as(self, module: str) -> tuple[Format, tuple[int, int]]:
        """Format and shape of a matrix."""
        n, k = self._shapes[f"{module}.weight"]
        return "dense", (n, k)


def estimate(path: Path, out: Path, recipe: Recipe, export: str, gate_tokens: int) -> Estimate:
    """Measure a piece of the work, which takes about a second, and count the rest.

    path: a model, of which config.json is enough. gate_tokens: held-out tokens of each model; 0: no gate.
    """
    config = ModelConfig.from_directory(path)
    recipe = for_export(export, recipe)
    held: Stored = PlainCheckpoint.open(path) if any(path.glob("*.safetensors")) else Shapes(config)
    layers = _by_layer(config)
    # The source, the result, and the result as other programs read it.
    gate_tokens *= 3 if recipe.values == "fitted" and recipe.scheme == "int4" else 2
    rates = measured_rates(config, recipe)
    judged = _plain(recipe, "fp8", algorithm="rtn", calibration_tokens=max(gate_tokens, 1))
    gate = layers[: config.num_hidden_layers] if gate_tokens else []
    return Estimate(
        [_work(config, recipe, i, matrices).seconds(rates) for i, matrices in enumerate(layers)],
        sum(_work(config, judged, i, matrices).seconds(rates) for i, matrices in enumerate(gate)),
        memory_needed(((name, held.shape(name)) for name in held.names()), config, recipe),
        available_memory(),
        expected_bytes(export, held, config, recipe),
        free_disk(out),
    )


_Matrices = list[tuple[str, tuple[int, int]]]  # modules and their shapes


def _by_layer(config: ModelConfig) -> list[_Matrices]:
    layers: list[_Matrices] = [[] for _ in range(config.num_hidden_layers + config.num_nextn_predict_layers)]
    for name, shape in parameter_shapes(config):
        if name.startswith("model.layers.") and len(shape) == 2:
            layers[int(name.split(".")[2])].append((name.removesuffix(".weight"), (shape[0], shape[1])))
    return layers


def _plain(recipe: Recipe, scheme: Literal["int4", "fp8"], **fields: Any) -> Recipe:
    """The recipe with one scheme for every matrix."""
    return replace(recipe, scheme=scheme, budget_bytes=None, measure="memory", **fields)


def _work(config: ModelConfig, recipe: Recipe, layer: int, matrices: _Matrices) -> Work:
    """The operations on one layer."""
    tokens = recipe.calibration_tokens
    mtp = layer >= config.num_hidden_layers
    passes = 2 if recipe.coarse and not mtp else 1
    rounds = int(recipe.scheme in ("int8", "int5", "int4"))
    if recipe.scheme == "auto":  # every option is rounded, and judged alone on a sample of the text
        rounds = 1 + len(FORMATS)
        passes += 1 + (_PARTS * len(FORMATS) + layer) * SAMPLE // tokens
    products = rounding = 0.0
    inputs, parameters = dict[str, tuple[int, float]](), Parameters(config)
    gram = recipe.needs_gram
    routed = config.num_experts_per_tok / (config.experts_in(layer) or 1)
    for module, (n, k) in matrices:
        share = routed if ".experts." in module else 1.0
        products += passes * tokens * share * n * k
        rounding += rounds * n * k * (k if gram else _SIDE)
        inputs[parameters.reads(module)] = k, tokens * share
    mixer = config.mixer(layer)
    seen = min(recipe.window, mixer.window or recipe.window)
    return Work(
        products=products,
        attention=passes * tokens * seen * mixer.cache_width * config.num_attention_heads,
        moments=sum(t * k * k for k, t in inputs.values()) * gram,
        factors=sum(k**3 for k, _ in inputs.values()) * gram * rounds,
        sorting=sum(k**2 for k, _ in inputs.values()) * gram * rounds,
        rounding=rounding,
    )


def measured_rates(config: ModelConfig, recipe: Recipe) -> Work:
    """Seconds per operation on this machine, as busy as it is now."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    x, w = random(_TOKENS, _SIDE), random(_ROWS, _SIDE)
    with bfloat16_products():
        dtype = torch.bfloat16 if short_products() else torch.float32
        up, down = (Matrix("", side.to(dtype).contiguous(), "") for side in (w, w.t()))
        mlp = SILU, up, up, down
        products = _time(lambda: TracedOps()._gated(x, mlp)) / (3 * _TOKENS * w.numel())
        q, keys = random(512, 16, 576), random(512, 576)

        def attend() -> None:
            scores = torch.einsum("thw,sw->ths", q, keys).softmax(-1)
            scores @ keys

        attention = _time(attend) / (512 * q.numel())
        recorder = recipe.recorder()
        recorder.before(Matrix("", w, ""), x)
        seen = recorder.inputs[""]
        moments = _time(lambda: seen.add_moments(x)) / (_TOKENS * _SIDE**2) if recipe.needs_gram else 0.0
    part = _plain(recipe, "int4") if recipe.scheme == "auto" else recipe
    factors = sorting = 0.0
    if recipe.needs_gram:
        # Of the largest matrices, which take most of this time and are factored fastest.
        large = torch.eye(2 * _SIDE)
        factors = _time(lambda: torch.linalg.cholesky_ex(large, upper=True)) / len(large) ** 3
        sorting = _time(lambda: round_piece(config, part, w[:_FEW], recorder)) / _SIDE**2 - factors * _SIDE
    rounding = _time(lambda: round_piece(config, part, w, recorder))
    rounding -= factors * _SIDE**3 + sorting * _SIDE**2
    rates = products, attention, moments, factors, sorting, rounding / (w.numel() * _SIDE)
    return Work(*(max(rate, 0.0) for rate in rates))


def _time(f: Callable[[], object]) -> float:
    """Seconds that a call takes, the median of some after the first."""
    seconds = []
    for _ in range(4):
        start = time.monotonic()
        f()
        seconds.append(time.monotonic() - start)
    return median(seconds[1:])
