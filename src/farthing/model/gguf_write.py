"""A checkpoint's tensors as GGUF has them: names, order of rows, and types, one computed after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.gguf import (
    ARCHITECTURES,
    COMPUTED,
    FUSED_INTO,
    ValueHeads,
    changes_of,
    columns_in_order,
    rows_in_order,
    values_in_order,
)
from farthing.checkpoint.gguf_types import BLOCK, BLOCKS, PLAIN, encode, kind_for
from farthing.checkpoint.reader import Checkpoint
from farthing.cpus import usable_cpus
from farthing.lazy import gguf, np, torch
from farthing.model.forms import DeltaHeads
from farthing.model.gguf_metadata import architecture_of, rotary_factors
from farthing.model.load import config_of, source_of
from farthing.model.parameters import parameter_shapes
from farthing.model.types import type_named
from farthing.ops.cut import Cut, cut_weight
from farthing.ops.weights import FP8_BLOCK, Weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

_TOGETHER = 1 << 16  # values of a matrix that a core takes at once, or a block of rows of FP8
_PRECISE = "Q8_0"  # of attention, embedding and head, where others are rounded to 4 or 5 bits
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(.*)\.(weight|bias)")
_PRECISE_IN_LLAMA_CPP = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")  # stored in float32


@dataclass
class Kept:
    """How the matrices of a type were stored."""

    matrices: int = 0
    exact: int = 0
    error: float = 0.0  # sums of squares, of those that are not exact: of differences, and of values
    total: float = 0.0

    def __str__(self) -> str:
        rounded = self.matrices - self.exact
        loss = sqrt(self.error / self.total) if self.total else 0.0
        return f"{self.matrices} matrices" + (f", {rounded} of them rounded by {loss:.2%}" if rounded else "")


@dataclass(frozen=True)
class Stored:
    """A tensor of the file; parts: computes its bytes, one part after the other."""

    name: str
    shape: tuple[int, ...]
    kind: str
    parts: Callable[[], Iterator[Bytes]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) // block_of(self.kind)[0] * block_of(self.kind)[1]


def block_of(kind: str) -> tuple[int, int]:
    """Columns and bytes of a block."""
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(columns), int(size)


class GgufTensors:
    """The tensors of a checkpoint under the architecture that its type has. Raises ConfigError for others.

    kind: the type of dense and FP8 matrices; below 8 bits, of feed-forwards' alone. None: that of their own
    values.
    """

    def __init__(self, checkpoint: Checkpoint, kind: str | None = None) -> None:
        config = replace(config_of(checkpoint), num_nextn_predict_layers=0)
        if (e := config.experts) and e.router.num_groups == e.router.top_k_groups:
            # llama.cpp refuses groups of experts that limit nothing.
            config = config.with_experts(router=replace(e.router, num_groups=1, top_k_groups=1))
        self.config = config
        self.architecture = architecture_of(self.config)
        self.kept: dict[str, Kept] = {}
        self._kind, self._source = kind, source_of(checkpoint, self.config)
        self._names = ARCHITECTURES[self.architecture]
        self._values = None
        if delta := next((m for m in self.config.mixers if isinstance(m, DeltaHeads)), None):
            s = delta.spec
            self._values = ValueHeads(s.key_heads, s.value_heads // s.key_heads, s.key_dim, s.value_dim)
        self.factors = rotary_factors(self.config.rope, self.config.attention.rotary_width)
        self._stored = type_named(self.config.model_type).names.stored

    def read_as(self) -> dict[str, dict[str, Any]]:
        """The names and shapes that a reader will find."""
        found = {self._own(name): {"shape": shape} for name, shape in parameter_shapes(self.config)}
        for whole, part in FUSED_INTO.items():
            for name in [name for name in found if f"{whole}." in name]:
                found |= {name.replace(whole, module): found[name] for module in self._names.fused[part]}
        return found

    def __iter__(self) -> Iterator[Stored]:
        """In the order of the forward pass. Raises KeyError for a name without a place."""
        if self.factors is not None:
            yield _plain(COMPUTED[0], self.factors)
        for name, shape in parameter_shapes(self.config):
            inner = re.sub(r"^model\.layers\.\d+\.", "", name)
            module, _, suffix = name.rpartition(".")
            if expert := _EXPERT.fullmatch(name):
                if expert[2] == "0":
                    yield self._stack(name, expert, shape)
            elif inner == "self_attn.kv_b_proj.weight":
                yield from self._key_and_value(name, module, shape)
            elif (fused := inner.removesuffix(".weight")) in FUSED_INTO:
                yield from self._fused(name, fused, shape)
            elif suffix == "weight" and len(shape) == 2 and inner not in _PRECISE_IN_LLAMA_CPP:
                yield self._matrix(self._name(name), module, shape)
            else:
                yield self._vector(name, shape)

    def _own(self, name: str) -> str:
        """Hugging Face's name in a model without a wrapper around its language model."""
        return self._stored(name).replace("language_model.", "")

    def _name(self, name: str) -> str:
        return self._names.stored(self._own(name))

    def _changes(self, name: str) -> dict[str, Any]:
        """Of a tensor by GGUF's name, as `farthing.checkpoint.gguf.describe` finds them."""
        said = self.config.attention.gguf()
        stem, _, suffix = name.rpartition(".")
        part = stem.rpartition(".")[2]

        return changes_of(self._names, suffix if part.isdecimal() else part, said.__getitem__, self._values)

    def _kind_of(self, weight: Weight, module: str) -> str:
        head = "model.embed_tokens" if self.config.head.tie_word_embeddings else "lm_head"
        if self.config.head.rounded_head and module == head and not weight.shape[1] % BLOCK:
            return _PRECISE  # as it is served
        if self._kind is None or weight.format not in ("dense", "fp8"):
            return kind_for(weight)
        if self._kind in PLAIN or weight.shape[1] % BLOCK:
            return "BF16"
        return self._kind if ".mlp." in module else _PRECISE

    def _encoded(self, weight: Weight, kind: str) -> Bytes:
        """Rows by rows, on all cores: what is computed of some rows stays in a core's caches."""
        n, k = weight.shape
        step = max(FP8_BLOCK, _TOGETHER // k // FP8_BLOCK * FP8_BLOCK)
        parts = [cut_weight(weight, Cut(0, at, min(at + step, n))) for at in range(0, n, step)]
        with ThreadPoolExecutor(usable_cpus()) as pool:
            data, exact, errors = zip(*pool.map(partial(_measured, kind), parts), strict=True)
            kept = self.kept.setdefault(kind, Kept())
            kept.matrices += 1
            kept.exact += all(exact)
            if not all(exact):
                kept.error += sum(errors)
                kept.total += sum(pool.map(lambda part: _squares(part.dequantize()), parts))
        return np.concatenate(data)

    def _matrix(self, name: str, module: str, shape: tuple[int, ...]) -> Stored:
        changes, (n, k) = self._changes(name), shape
        kind = self._kind_of(self._source.weight(module, (n, k)), module)

        def parts() -> Iterator[Bytes]:
            weight = self._source.weight(module, (n, k))
            if (order := changes.get("order", (0,)))[0]:
                weight = columns_in_order(weight, np.argsort(values_in_order(order, k)))
            yield _in_place(self._encoded(weight, kind), changes)

        return Stored(name, shape, kind, parts)

    def _stack(self, name: str, expert: re.Match[str], shape: tuple[int, ...]) -> Stored:
        """A matrix of all experts of a layer, or their biases."""
        count = self.config.n_routed_experts
        modules = [f"{expert[1]}.{e}.{expert[3]}" for e in range(count)]
        if expert[4] == "bias":
            biases = (self._source.weight(module).bias for module in modules)
            return _plain(
                self._name(name), lambda: np.stack([_float32(bias) for bias in biases]), (count, *shape)
            )
        n, k = shape
        kinds = {self._kind_of(self._source.weight(module, (n, k)), module) for module in modules}
        kind = kinds.pop() if len(kinds) == 1 else "BF16" if kinds & {*PLAIN} else "Q8_0"  # experts differ

        def parts() -> Iterator[Bytes]:
            for module in modules:
                yield self._encoded(self._source.weight(module, (n, k)), kind)

        return Stored(self._name(name), (count, n, k), kind, parts)

    def _fused(self, name: str, module: str, shape: tuple[int, ...]) -> Iterator[Stored]:
        """Qwen3-Next's projections: in parts if those have names of their own."""
        n, k = shape
        prefix, part = name.partition(module)[0], FUSED_INTO[module]
        assert self._values is not None
        keys, widths = self._values.keys, self._values.widths(part)
        kind = self._kind_of(self._source.weight(prefix + module, (n, k)), prefix)

        def rows(chosen: tuple[int, ...] | None) -> Iterator[Bytes]:
            data = self._encoded(self._source.weight(prefix + module, (n, k)), kind)
            yield data if chosen is None else data[rows_in_order({"parts_of": (keys, widths, chosen)}, n)]

        split = {m: c for m, c in self._names.fused[part].items() if m in self._names.layer.values()}
        for own, chosen in split.items():
            size = keys * sum(widths[i] for i in chosen)
            yield Stored(self._name(f"{prefix}{own}.weight"), (size, k), kind, partial(rows, chosen))
        if not split:
            yield Stored(f"blk.{name.split('.')[2]}.{part}.weight", shape, kind, partial(rows, None))

    def _key_and_value(self, name: str, module: str, shape: tuple[int, ...]) -> Iterator[Stored]:
        """kv_b_proj [H (n + v), c] as keys [H, c, n] and values [H, v, c]."""
        heads, (n, rank) = self.config.latent, shape
        count, nope = heads.num_attention_heads, heads.qk_nope_head_dim
        weight = self._source.weight(module, (n, rank))
        kind = self._kind_of(weight, module)
        # Keys are transposed, so the groups of a quantized matrix do not fit them.
        for_keys = kind if kind in PLAIN else "BF16" if nope % BLOCK else _PRECISE
        dtype = weight.data.dtype if weight.format == "dense" else torch.float32

        def keys() -> Iterator[Bytes]:
            value = self._source.weight(module, (n, rank)).dequantize(dtype).view(count, -1, rank)
            yield self._encoded(Weight("dense", value[:, :nope].mT.flatten(0, 1).contiguous()), for_keys)

        def values() -> Iterator[Bytes]:
            data = self._encoded(self._source.weight(module, (n, rank)), kind)
            yield np.ascontiguousarray(data.reshape(count, n // count, -1)[:, nope:])

        base = self._name(name).removesuffix("v_b.weight")
        yield Stored(base + "k_b.weight", (count, rank, nope), for_keys, keys)
        yield Stored(base + "v_b.weight", (count, heads.v_head_dim, rank), kind, values)

    def _vector(self, name: str, shape: tuple[int, ...]) -> Stored:
        """In float32, as llama.cpp wants norms, biases, routers and convolutions."""
        stored = self._name(name)
        changes = self._changes(stored)
        squeezed = tuple(size for size in shape if size > 1 or len(shape) == 1)

        def value() -> Floats:
            rows = _float32(self._source.tensor(name, shape)).reshape(shape[0], -1)
            array: Floats = _in_place(rows, changes).reshape(squeezed)
            then = changes.get("then")
            return array + 1 if then == "minus 1" else -np.exp(array) if then == "log" else array

        return _plain(stored, value, squeezed)


def _plain(name: str, value: Floats | Callable[[], Floats], shape: tuple[int, ...] | None = None) -> Stored:
    def parts() -> Iterator[Bytes]:
        found = value() if callable(value) else value
        yield np.ascontiguousarray(found, np.float32).view(np.uint8)

    return Stored(name, value.shape if shape is None and not callable(value) else shape or (), "F32", parts)


def _in_place(rows: Any, changes: Mapping[str, Any]) -> Any:
    """Rows of Hugging Face's tensor where GGUF has them."""
    order = rows_in_order(changes, len(rows))
    return rows if order is None else rows[np.argsort(order)]


def _float32(tensor: Any) -> Floats:
    found: Floats = tensor.float().numpy()
    return found


def _measured(kind: str, weight: Weight) -> tuple[Bytes, bool, float]:
    """A matrix in a type, whether that has exactly its values, and the sum of squared errors."""
    data, exact = encode(weight, kind)
    return data, exact, 0.0 if exact else _squares(_decoded(data, kind) - weight.dequantize())


def _squares(values: Any) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _decoded(data: Bytes, kind: str) -> Any:
    if kind in PLAIN:
        return torch.from_numpy(data).view(getattr(torch, PLAIN[kind])).float()
    return BLOCKS[kind](data.reshape(len(data), -1, block_of(kind)[1])).on_torch().dequantize()
