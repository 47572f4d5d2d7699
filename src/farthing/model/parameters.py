"""The parameters of a whole model, in the order of the forward pass (see `farthing.model.spec`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from farthing.lazy import torch
from farthing.model.config import ModelConfig
from farthing.model.spec import COMPRESSED, Tensor, Tensors, of_expert

if TYPE_CHECKING:
    from torch import Tensor as Values


def each_kind(config: ModelConfig) -> Tensors:
    """Every parameter, of routed experts those of each layer's first alone."""
    d, v = config.hidden_size, config.vocab_size
    yield Tensor("model.embed_tokens.weight", (v, d), "embedding", part="ends")
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        yield from of_layer(config, layer)
    if config.streams:
        yield from _streams(config, "model.hc_head.hc_", "ends", ends=True)
    yield Tensor("model.norm.weight", (d,), "norm", part="ends")
    if not config.head.tie_word_embeddings:
        yield Tensor("lm_head.weight", (v, d), "head", part="ends")


def of_layer(config: ModelConfig, layer: int) -> Tensors:
    """The parameters of a layer, of routed experts those of the first alone."""
    c, d, p = config, config.hidden_size, f"model.layers.{layer}."
    if layer >= c.num_hidden_layers:
        yield from _joins(c, p)
    yield Tensor(p + "input_layernorm.weight", (d,), "norm", part="layer")
    mixer = c.mixer(layer)
    yield from mixer.tensors(f"{p}{mixer.module}.", d)
    if c.post_norms:
        yield Tensor(p + "self_attn.post_norm.weight", (d,), "norm")
    yield Tensor(p + "post_attention_layernorm.weight", (d,), "norm", part="layer")
    feed = c.feed(layer)
    yield from feed.tensors(p + "mlp.", d, c.vocab_size)
    for half in ("attn_hc.", "ffn_hc.") if c.streams else ():
        yield from _streams(c, p + half, "layer")
    if feed.scaled:
        yield Tensor(p + "layer_scalar", (1,), "scale", part="layer")


def tensors_of(config: ModelConfig) -> Tensors:
    """Every parameter of a checkpoint."""
    stack: list[Tensor] = []  # of a layer's first expert, until all of it are known
    for tensor in each_kind(config):
        if tensor.expert is not None:
            stack.append(tensor)
            continue
        yield from _experts(config, stack)
        yield tensor
    yield from _experts(config, stack)


def _experts(config: ModelConfig, stack: list[Tensor]) -> Tensors:
    for expert in range(config.experts_in(layer_of(stack[0].name) or 0) if stack else 0):
        yield from (of_expert(tensor, expert) if expert else tensor for tensor in stack)
    stack.clear()


def layer_of(name: str) -> int | None:
    """The layer of a parameter; None for the top level."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of a checkpoint."""
    return ((tensor.name, tensor.shape) for tensor in tensors_of(config))


class Parameters:
    """The parameters of a model, found by their names or modules."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._layers: dict[int | None, dict[str, Tensor]] = {}

    def find(self, name: str) -> Tensor | None:
        """The parameter of a name or module; None: the model has none."""
        first = _EXPERT.sub(".experts.0.", name).removesuffix(".weight")
        tensor = self._layer(name).get(first)
        return tensor and _of_expert_in(name, tensor)

    def reader(self, name: str) -> Tensor:
        """A matrix with an input of that name. Raises StopIteration if there is none."""
        first = _EXPERT.sub(".experts.0.", name)
        own = self._layer(name).values()
        return _of_expert_in(name, next(t for t in own if t.role in COMPRESSED and t.input == first))

    def _layer(self, name: str) -> dict[str, Tensor]:
        """The parameters of the layer of a name, by module."""
        layer = layer_of(name)
        if layer not in self._layers:
            own = each_kind(self._config) if layer is None else of_layer(self._config, layer)
            self._layers[layer] = {tensor.module: tensor for tensor in own}
        return self._layers[layer]

    def __getitem__(self, name: str) -> Tensor:
        """The same. Raises KeyError if there is none."""
        if (tensor := self.find(name)) is None:
            raise KeyError(name)
        return tensor

    def rounds(self, module: str) -> bool:
        """Whether a recipe may round a module."""
        return (tensor := self.find(module)) is not None and tensor.role in COMPRESSED

    def reads(self, module: str) -> str:
        """A name for a module's input; modules that share an input share a name."""
        tensor = self.find(module)
        return module if tensor is None else tensor.input

    def scaled_with(self, module: str) -> str:
        """The same where experts that read parts of one input share its scale."""
        tensor = self.find(module)
        return module if tensor is None else tensor.scaled_with


def _of_expert_in(name: str, first: Tensor) -> Tensor:
    """The first expert's tensor as that of the expert in a name, if one is."""
    expert = _EXPERT.search(name)
    return of_expert(first, int(expert[1])) if expert else first


_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def _joins(c: ModelConfig, p: str) -> Tensors:
    """What joins the two inputs of an MTP layer, and the norm before its head."""
    d = c.hidden_size
    yield Tensor(p + "enorm.weight", (d,), "norm", part="layer")
    yield Tensor(p + "hnorm.weight", (d,), "norm", part="layer")
    if c.streams:
        for name in ("e_proj", "h_proj"):
            yield Tensor(f"{p}{name}.weight", (d, d), "matrix", part="layer")
        yield from _streams(c, p + "hc_head.hc_", "layer", ends=True)
    else:
        yield Tensor(p + "eh_proj.weight", (d, 2 * d), "join", part="layer")
    yield Tensor(p + "shared_head.norm.weight", (d,), "norm", part="ends")


def _streams(c: ModelConfig, p: str, part: Literal["ends", "layer"], ends: bool = False) -> Tensors:
    assert c.streams is not None
    n = c.streams.count
    rows = n if ends else n * (n + 2)
    yield Tensor(p + "fn", (rows, n * c.hidden_size), part=part)
    yield Tensor(p + "base", (rows,), "bias", part=part)
    yield Tensor(p + "scale", (1 if ends else 3,), "scale", part=part)


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, Values]:
    """Random float32 parameters of plausible scale, for tests and benchmarks."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for tensor in tensors_of(config):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.role == "table":
            ranks = torch.rand(tensor.shape[0], config.router_size, generator=generator)
            parameters[tensor.name] = ranks.argsort()[:, : tensor.shape[1]]
        elif tensor.role == "bias":
            parameters[tensor.name] = 0.1 * noise
        elif tensor.role in ("norm", "scale"):
            offset = config.norm_offset if tensor.role == "norm" else 0.0
            parameters[tensor.name] = 1 - offset + 0.1 * noise
        elif tensor.role == "embedding":
            parameters[tensor.name] = noise
        else:
            parameters[tensor.name] = noise / math.sqrt(tensor.shape[-1])
    return parameters
