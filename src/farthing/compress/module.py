"""INT8 for any torch.nn.Module with Conv2d and Linear layers (a CNN as well as a language model's block).

Weights get one scale an output channel, inputs one calibrated scale a tensor; both symmetric with zero
point 0, which is what TensorRT takes. The result is an ordinary module that computes what int8 hardware
computes and exports to ONNX with explicit QuantizeLinear/DequantizeLinear nodes.

Legend: B images; C channels; N output channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from farthing.compress.calibrate.activations import refine
from farthing.compress.calibrate.histogram import Histogram
from farthing.compress.calibrate.observers import OBSERVERS, Observer
from farthing.compress.quantize.grid import int8_grid
from farthing.compress.recipe import OBSERVER_NAMES
from farthing.compress.statistics import Interval, proportion_interval

SAMPLES = 4  # inputs a layer keeps to measure its output error on
Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """How one layer's input is rounded, and the relative output error of every candidate."""

    layer: str
    observer: str
    scale: float
    errors: dict[str, float]


class QuantizedLayer(nn.Module):
    """A Conv2d or Linear on int8 inputs and int8 weights."""

    def __init__(self, layer: Layer, input_scale: float, weight_scale: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("input_scale", torch.tensor(input_scale))
        self.register_buffer("weight_scale", weight_scale)  # [N]

    def forward(self, x: Tensor) -> Tensor:
        """The layer on rounded input and weight, in float."""
        scale: Any = self.input_scale
        x = torch.fake_quantize_per_tensor_affine(x, float(scale), 0, -128, 127)
        return run_layer(self.layer, x, self.rounded_weight())

    def rounded_weight(self) -> Tensor:
        """The weight as int8 holds it."""
        scale: Any = self.weight_scale
        zero = torch.zeros(len(scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(self.layer.weight, scale, zero, 0, -128, 127)


def run_layer(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight; a subclass's own forward (static padding, say) is kept."""
    out: Tensor = torch.func.functional_call(layer, {"weight": weight}, (x,))
    return out


def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy with every BatchNorm2d that directly follows a Conv2d folded into it.

    What follows what is seen by running `example`: it works for any control flow, without tracing a graph.
    """
    model = copy.deepcopy(model).eval()
    producer: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                producer[id(out)] = (name, out)  # the tensor is kept, so that its id stays its own
            elif id(args[0]) in producer:
                pairs.append((producer[id(args[0])][0], name))

        return hook

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(after(n)) for n, m in model.named_modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    for conv, norm in pairs:
        fused = fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(norm))  # type: ignore[type-var, arg-type]
        replace_module(model, conv, fused)
        replace_module(model, norm, nn.Identity())
    return model


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


@dataclass(slots=True)
class _Seen:
    histogram: Histogram = field(default_factory=Histogram)
    inputs: list[Tensor] = field(default_factory=list)


def quantize_int8(
    model: nn.Module,
    batches: Iterable[Tensor],
    observer: Observer | Literal["auto"] = "auto",
    skip: Sequence[str] = (),
) -> tuple[nn.Module, list[LayerChoice]]:
    """Calibrate on `batches` and quantize every Conv2d and Linear not named in `skip`.

    "auto": per layer the observer with the least measured output error; a name forces one. Raises
    ValueError where the model has no such layer or an input is NaN.
    """
    model = copy.deepcopy(model).eval()
    layers: dict[str, Layer] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in skip
    }
    if not layers:
        raise ValueError("the model has no Conv2d or Linear layer to quantize")
    seen = _observe(model, layers, batches)
    names: Sequence[Observer] = OBSERVER_NAMES if observer == "auto" else (observer,)
    choices = []
    for name, layer in layers.items():
        weight_scale = int8_grid(
            layer.weight.detach().flatten(1)[None], torch.ones(1, layer.weight[0].numel())
        )
        choice, quantized = _choose(name, layer, weight_scale.scale.flatten(), seen[name], names)
        choices.append(choice)
        replace_module(model, name, quantized)
    return model, choices


def _observe(model: nn.Module, layers: dict[str, Layer], batches: Iterable[Tensor]) -> dict[str, _Seen]:
    seen = {name: _Seen() for name in layers}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            entry = seen[name]
            entry.histogram.add(args[0])
            kept = sum(len(x) for x in entry.inputs)
            if kept < SAMPLES:
                entry.inputs.append(args[0][: SAMPLES - kept].detach().clone())

        return hook

    hooks = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(entry.inputs for entry in seen.values()):
        raise ValueError("no calibration batch was given; expected at least one")
    return seen


def _choose(
    name: str, layer: Layer, weight_scale: Tensor, seen: _Seen, observers: Sequence[Observer]
) -> tuple[LayerChoice, QuantizedLayer]:
    candidates: dict[str, tuple[float, float, QuantizedLayer]] = {}
    with torch.no_grad():
        x = torch.cat(seen.inputs) if seen.inputs else torch.zeros(0)
        exact = run_layer(layer, x, layer.weight) if len(x) else torch.zeros(1)
        norm = float(exact.square().sum()) or 1.0
        for observer in observers:
            scale = max(OBSERVERS[observer](seen.histogram) / 127, 1e-12)
            quantized = QuantizedLayer(layer, scale, weight_scale)
            error = float((quantized(x) - exact).square().sum()) / norm if len(x) else 0.0
            candidates[observer] = (error, scale, quantized)
        if len(observers) > 1 and len(x):  # look on around the best, as `activations.choose` does
            start = candidates[min(candidates, key=lambda o: candidates[o][0])][1]

            def relative(scale: float) -> float:
                quantized = QuantizedLayer(layer, scale, weight_scale)
                return float((quantized(x) - exact).square().sum()) / norm

            scale, error = refine(start, relative)
            candidates["measured"] = (error, scale, QuantizedLayer(layer, scale, weight_scale))
    best = min(candidates, key=lambda o: candidates[o][0])
    errors = {str(o): c[0] for o, c in candidates.items()}
    return LayerChoice(name, best, candidates[best][1], errors), candidates[best][2]


@dataclass(frozen=True, slots=True)
class TopOne:
    """Top-1 accuracy of two models on the same images, with the paired interval of the difference."""

    a: float
    b: float
    difference: Interval  # b - a
    images: int

    def verdict(self, max_drop: float) -> str:
        """'pass' if b is surely at most `max_drop` below a, 'fail' if surely more, else 'cannot tell'."""
        if -self.difference.low <= max_drop:
            return "pass"
        return "fail" if -self.difference.high > max_drop else "cannot tell"


def compare_top1(a: nn.Module, b: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> TopOne:
    """batches of (images [B, C, H, W], labels [B])."""
    right_a = right_b = wins = losses = images = 0
    with torch.no_grad():
        for x, labels in batches:
            hit_a, hit_b = a(x).argmax(1) == labels, b(x).argmax(1) == labels
            right_a, right_b = right_a + int(hit_a.sum()), right_b + int(hit_b.sum())
            wins, losses = wins + int((hit_b & ~hit_a).sum()), losses + int((hit_a & ~hit_b).sum())
            images += len(labels)
    return TopOne(right_a / images, right_b / images, proportion_interval(wins, losses, images), images)
