"""A checkpoint of any type as compression reads it: single matrices under DeepSeek-V3's names.

A type may have other names, or store a layer's experts in stacks. Results have the type's own names, and
experts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from farthing.checkpoint.reader import MXFP4_GROUP, Checkpoint
from farthing.checkpoint.shards import CheckpointError, Shards
from farthing.model import (
    ModelConfig,
    Names,
    Parameters,
    WeightSource,
    names_in,
    parameter_shapes,
    stack_of,
    stores_head,
    unstacked,
)
from farthing.ops.weights import FP8_BLOCK, Format, Weight

_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the main ones, in MTP layers


class PlainCheckpoint(Checkpoint):
    """A checkpoint under V3's names."""

    def __init__(self, path: Path, config: dict[str, Any], shards: Shards) -> None:
        super().__init__(path, config, shards)
        model, own = ModelConfig.from_json(config), Checkpoint(path, config, shards)
        self._names: Names = names_in(own, model)
        if model.head.tie_word_embeddings and stores_head(own, self._names):
            raise CheckpointError(
                f"{path}: tie_word_embeddings: true; expected false: lm_head.weight is stored"
            )
        self._shards = _PlainShards(shards, own, model, self._names)
        self.input_scales.alike = Parameters(model).scaled_with

    def stored(self, name: str) -> str:
        return self._names.stored(name)

    @property
    def stacked(self) -> bool:
        """Whether a layer's experts are stored in stacks."""
        return isinstance(self._shards, _PlainShards) and self._shards.stacked

    def skipped(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that are not computed, such as a vision tower's, under their own names."""
        assert isinstance(self._shards, _PlainShards)
        for name in self._shards.others:
            if any(fnmatchcase(name, pattern) for pattern in self._names.skipped):
                yield name, self._shards.inner.read(name)


def embedded(config: ModelConfig, table: Tensor, ids: Tensor) -> Tensor:
    """The first layer's input [T, D] float32, for ids [T]."""
    h = F.embedding(ids, table).float() * config.embedding_scale
    return h if config.streams is None else h.repeat(1, config.streams.count)


def final_norm(checkpoint: Checkpoint, config: ModelConfig) -> Tensor:
    """The weight [D] of the norm before the head, float32."""
    return checkpoint.tensor("model.norm.weight").float() + config.norm_offset


class _PlainShards(Shards):
    """The tensors of other shards, by V3's names; of stacks, each expert's."""

    def __init__(self, inner: Shards, own: Checkpoint, config: ModelConfig, names: Names) -> None:
        self.inner, self._type, self.reading = inner, names, inner.reading
        shapes = dict(parameter_shapes(config))
        layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        wanted = [*shapes, *(f"model.layers.{i}.{copy}" for i in layers for copy in _COPIES)]
        tensors = {names.stored(name): name for name in wanted}
        modules = {_module(stored): _module(name) for stored, name in tensors.items()}
        self._plain: dict[str, str] = {}  # stored name by V3's
        self.others: list[str] = []
        stacks: set[str] = set()
        self._expert: dict[str, tuple[int, ...]] = {}  # shape of an expert's matrix or bias, by V3's name
        for stored in inner.file_of:
            module, leaf = _module(stored), stored.rpartition(".")[2]
            if stored in tensors or module in modules:
                self._plain[tensors.get(stored) or f"{modules[module]}.{leaf}"] = stored
            else:
                self.others.append(stored)
        for name, shape in shapes.items():
            if ".experts." in name and name not in self._plain and self._parts(name):
                self._expert[name] = shape
                stacks.add(self._stack(name))
        self.others = [name for name in self.others if not any(name.startswith(stack) for stack in stacks)]
        self._experts: WeightSource = unstacked(own, config)
        self._count = config.n_routed_experts or 1
        self.file_of = {name: inner.file_of[stored] for name, stored in self._plain.items()}
        self.file_of |= {name: self._file(name) for name in self._expert}

    @property
    def stacked(self) -> bool:
        """Whether experts are in stacks."""
        return bool(self._expert)

    def _stack(self, name: str) -> str:
        return self._type.stored(stack_of(name))

    def _parts(self, name: str) -> list[str]:
        """The stacks that an expert's tensor is in: of the values, and of their scales."""
        stack, suffixes = self._stack(name), ("", "_blocks", "_scales", "_scale_inv")
        return [each for suffix in suffixes if (each := f"{stack}{suffix}") in self.inner.file_of]

    def _file(self, name: str) -> str:
        return self.inner.file_of[self._parts(name)[0]]

    def _of_stack(self, name: str) -> Weight:
        return self._experts.weight(_module(name))

    def read(self, name: str) -> Tensor:
        if name in self._plain:
            return self.inner.read(self._plain[name])
        weight = self._of_stack(name)
        if name.endswith(".bias"):
            assert weight.bias is not None
            return weight.bias
        return weight.data

    def stored(self, name: str) -> tuple[Format, int] | None:
        if name in self._plain:
            return self.inner.stored(self._plain[name])
        if name not in self._expert or name.endswith(".bias"):
            return None
        parts = self._parts(name)
        if parts[0].endswith("_blocks"):
            return "mxfp4", MXFP4_GROUP
        return ("fp8", FP8_BLOCK) if len(parts) > 1 else None

    def weight(self, name: str) -> Weight | None:
        if name in self._plain:
            return self.inner.weight(self._plain[name])
        if self.stored(name) is None:
            return None
        return self._of_stack(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(self._plain[name]) if name in self._plain else self._expert[name]

    def nbytes(self, name: str) -> int:
        if name in self._plain:
            return self.inner.nbytes(self._plain[name])
        share = self._count * (1 if "down_proj" in name else 2)
        return sum(self.inner.nbytes(part) for part in self._parts(name)) // share

    def dtype(self, name: str) -> str:
        if name in self._plain:
            return self.inner.dtype(self._plain[name])
        return self.inner.dtype(self._parts(name)[0])

    def tail(self, name: str) -> bytes:
        return self.inner.tail(name)

    def release(self) -> None:
        self.inner.release()


def _module(name: str) -> str:
    return name.rpartition(".")[0]
