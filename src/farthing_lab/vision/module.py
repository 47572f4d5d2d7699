"""INT8 for any torch.nn.Module with Conv2d and Linear layers, and top-1 of its ONNX export.

Weights get one scale per output channel, inputs one calibrated scale per tensor; both are symmetric, which
is what TensorRT supports. The result is an ordinary module that computes what int8 hardware does, and
exports to ONNX with explicit QuantizeLinear/DequantizeLinear nodes.

Legend: B images; C channels; N output channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from farthing.compress.evaluate import Interval, proportion_interval
from farthing.compress.quantize import int8_grid
from farthing_lab.compress.ranges import OBSERVER_NAMES, OBSERVERS, Histogram, refine
from farthing_lab.compress.settings import Observer

SAMPLES = 8  # inputs kept per layer to measure its output error
Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The observer and scale of one layer's input, with the relative output error of each candidate."""

    layer: str
    observer: str
    scale: float
    errors: dict[str, float]


class QuantizedLayer(nn.Module):
    """A Conv2d or Linear with int8 inputs and int8 weights."""

    def __init__(self, layer: Layer, input_scale: float, weight_scale: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("input_scale", torch.tensor(input_scale))
        self.register_buffer("weight_scale", weight_scale)  # [N]

    def forward(self, x: Tensor) -> Tensor:
        """The layer on rounded input and weight, computed in float."""
        scale: Any = self.input_scale
        return run_layer(self.layer, round_input(x, float(scale)), self.rounded_weight())

    def rounded_weight(self) -> Tensor:
        """The weight rounded to int8, in float."""
        scale: Any = self.weight_scale
        zero = torch.zeros(len(scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(self.layer.weight, scale, zero, 0, -128, 127)


def run_layer(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Run the layer with another weight, keeping a subclass's forward (such as static padding)."""
    out: Tensor = torch.func.functional_call(layer, {"weight": weight}, (x,))
    return out


def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy with every BatchNorm2d that directly follows a Conv2d folded into it.

    Running `example` shows which module follows which, so no graph tracing is needed.
    """
    model = copy.deepcopy(model).eval()
    producer: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                producer[id(out)] = (name, out)  # keep the tensor so that its id is not reused
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
    """Replace the submodule `name` with `new`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


@dataclass(slots=True)
class Seen:
    """Inputs of one layer: the counts of |x|, and a uniform sample of SAMPLES inputs."""

    histogram: Histogram = field(default_factory=Histogram)
    inputs: list[Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Count and sample a batch."""
        self.histogram.add(x)
        for one in x.detach():
            self.count += 1
            if len(self.inputs) < SAMPLES:
                self.inputs.append(one.clone())
            elif (slot := int(torch.randint(self.count, (), generator=generator))) < SAMPLES:
                self.inputs[slot] = one.clone()


def quantize_int8(
    model: nn.Module,
    batches: Iterable[Tensor],
    observer: Observer | Literal["auto"] = "auto",
    skip: Sequence[str] = (),
) -> tuple[nn.Module, list[LayerChoice]]:
    """Calibrate on `batches` and quantize every Conv2d and Linear not named in `skip`.

    "auto" picks per layer the observer with the least measured output error; a name forces one. Raises
    ValueError if the model has no such layer or an input is NaN.
    """
    return quantize_observed(model, observe(model, batches, skip), observer)


def quantize_observed(
    model: nn.Module, seen: Mapping[str, Seen], observer: Observer | Literal["auto"] = "auto"
) -> tuple[nn.Module, list[LayerChoice]]:
    """`quantize_int8` from recorded inputs, so that one pass over the data serves several observers."""
    model = copy.deepcopy(model).eval()
    names: Sequence[Observer] = OBSERVER_NAMES if observer == "auto" else (observer,)
    choices = []
    for name, entry in seen.items():
        layer: Any = model.get_submodule(name)
        weight = layer.weight.detach().flatten(1)
        scale = int8_grid(weight[None], torch.ones(1, weight.shape[1])).scale.flatten()
        choice = _choose(name, layer, scale, entry, names)
        choices.append(choice)
        quantized = QuantizedLayer(layer, choice.scale, scale)
        if isinstance(layer, nn.Conv2d) and entry.inputs:
            correct_bias(quantized, torch.stack(entry.inputs))
        replace_module(model, name, quantized)
    return model, choices


def correct_bias(quantized: QuantizedLayer, x: Tensor) -> None:
    """Correct the bias of a convolution by the mean shift of each output channel that rounding causes on
    x [B, C, H, W] (Nagel et al. 2019, section 4.2). Linear layers are skipped: too few outputs for a mean."""
    layer: Any = quantized.layer
    with torch.no_grad():
        shift = (run_layer(layer, x, layer.weight) - quantized(x)).mean((0, 2, 3))
        layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)


def observe(model: nn.Module, batches: Iterable[Tensor], skip: Sequence[str] = ()) -> dict[str, Seen]:
    """Run `batches` through the model and record the input of every Conv2d and Linear not in `skip`.

    Raises ValueError if the model has no such layer, an input is NaN, or there is no batch.
    """
    model = copy.deepcopy(model).eval()
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in skip
    }
    if not layers:
        raise ValueError("the model has no Conv2d or Linear layer to quantize")
    seen = {name: Seen() for name in layers}
    generator = torch.Generator().manual_seed(0)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].add(args[0], generator)

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
        raise ValueError("no calibration batches; expected at least one")
    return seen


def _choose(
    name: str, layer: Layer, weight_scale: Tensor, seen: Seen, observers: Sequence[Observer]
) -> LayerChoice:
    scales: dict[str, float] = {o: max(OBSERVERS[o](seen.histogram) / 127, 1e-12) for o in observers}
    if not seen.inputs:  # the calibration batches never reached this layer
        return LayerChoice(name, observers[0], scales[observers[0]], dict.fromkeys(scales, 0.0))
    with torch.no_grad():
        x = torch.stack(seen.inputs)
        exact = run_layer(layer, x, layer.weight)
        norm = float(exact.square().sum()) or 1.0
        rounded = QuantizedLayer(layer, 1.0, weight_scale).rounded_weight()

        def error(scale: float) -> float:
            return float((run_layer(layer, round_input(x, scale), rounded) - exact).square().sum()) / norm

        errors = {o: error(scale) for o, scale in scales.items()}
        if len(observers) > 1:  # search further around the best, like `activations.choose`
            best = min(errors, key=errors.__getitem__)
            scales["measured"], errors["measured"] = refine(scales[best], error)
    best = min(errors, key=errors.__getitem__)
    return LayerChoice(name, best, scales[best], errors)


def round_input(x: Tensor, scale: float) -> Tensor:
    """Quantize to symmetric int8 with one scale and dequantize."""
    return torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)


@dataclass(frozen=True, slots=True)
class TopOne:
    """Top-1 accuracy of two models on the same images, with the paired interval of the difference."""

    a: float
    b: float
    difference: Interval  # b - a
    images: int

    def verdict(self, max_drop: float) -> str:
        """'pass' if the interval of b is within `max_drop` below a, 'fail' if beyond, else 'cannot tell'."""
        if -self.difference.low <= max_drop:
            return "pass"
        return "fail" if -self.difference.high > max_drop else "cannot tell"


def compare_top1(
    a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> TopOne:
    """a, b: images [B, C, H, W] -> logits [B, classes]; batches of (images, labels [B])."""
    right_a = right_b = wins = losses = images = 0
    with torch.no_grad():
        for x, labels in batches:
            hit_a, hit_b = a(x).argmax(1) == labels, b(x).argmax(1) == labels
            right_a, right_b = right_a + int(hit_a.sum()), right_b + int(hit_b.sum())
            wins, losses = wins + int((hit_b & ~hit_a).sum()), losses + int((hit_a & ~hit_b).sum())
            images += len(labels)
    return TopOne(right_a / images, right_b / images, proportion_interval(wins, losses, images), images)


_BATCH = 32


def top1_of_files(a: Path, b: Path, data: Path) -> TopOne:
    """Compare two .onnx files on an .npz of `images` [N, C, H, W] (as the network expects) and `labels` [N].

    Raises ValueError with the file and its missing arrays.
    """
    images, labels = _labelled(data)
    batches = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    return compare_top1(_session(a), _session(b), batches)


def _labelled(data: Path) -> tuple[Tensor, Tensor]:
    with np.load(data) as arrays:
        missing = {"images", "labels"} - set(arrays)
        if missing:
            raise ValueError(f"{str(data)!r} has no {sorted(missing)}; expected arrays 'images' and 'labels'")
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{str(data)!r} has images {list(images.shape)} and labels {list(labels.shape)}; "
            "expected [N, C, H, W] and [N]"
        )
    return images.float(), labels.long()


def _session(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    taken = session.get_inputs()[0]
    together = 1 if taken.shape[0] == 1 else _BATCH  # 1: the file was exported for single images

    def run(x: Tensor) -> Tensor:
        parts = [session.run(None, {taken.name: part.numpy()})[0] for part in x.split(together)]
        return torch.from_numpy(np.concatenate(parts))

    return run
