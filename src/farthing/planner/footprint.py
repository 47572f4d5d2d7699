"""Bytes that a backend needs for a weight, from its shape and stored format.

Legend: N output rows, K input columns. The CPU backend reports the size of its packed matrices; without the
native module they count as much as the stored format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any, Literal

from farthing.checkpoint.layout import Scheme, group_within
from farthing.checkpoint.reader import (
    MXFP4,
    MXFP4_GROUP,
    Checkpoint,
    method_of,
    quantization_in,
    read_quantization,
)
from farthing.model import ModelConfig, Parameters, names_in, stack_of
from farthing.model.fields import optional_section, wrong
from farthing.model.spec import PUBLISHED
from farthing.model.types import type_of
from farthing.ops.weights import FP8_BLOCK, INTEGERS, WIDER, Format, int4_group, loaded_as

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Kind = Format | Literal["float32", "bfloat16", "float16"]
_FLOATS: dict[str, Kind] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_TENSORS: dict[str, Kind] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "fp8"}


@dataclass(frozen=True, slots=True)
class Stored:
    """How a checkpoint stores a parameter; group: columns per scale, where groups of columns have one."""

    kind: Kind
    group: int = 128
    zero: bool = False  # with zero points

    @property
    def is_float(self) -> bool:
        """Not quantized."""
        return self.kind in FLOAT_BYTES


_EXPERT = re.compile(r"\.experts\.\d+\.")
StoredOf = Callable[[str], Stored]


def quantization_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """quantization_config, at the top level or of the text part, or params.json's quantization; empty if the
    weights are not quantized.

    Raises ValueError if it is no object.
    """
    optional_section(raw, "text_config")
    section = quantization_in(raw) or {}
    if not isinstance(section, Mapping):
        raise wrong("quantization_config", section, "an object")
    return section


def stored_by_config(raw: Mapping[str, Any]) -> StoredOf:
    """Formats declared by config.json: quantized linear modules, everything else in torch_dtype.

    Raises ValueError for a format that checkpoints are not read in.
    """
    text = optional_section(raw, "text_config")
    dtype = next((d for c in (raw, text) for d in (c.get("torch_dtype"), c.get("dtype")) if d), None)
    plain = Stored(_FLOATS.get(str(dtype), "bfloat16"))
    layers = text.get("num_hidden_layers", raw.get("num_hidden_layers"))
    names = type_of(raw).names.in_model(layers if isinstance(layers, int) else 0)
    quantization, stored_name = quantization_of(raw), names.stored
    layout = read_quantization(quantization) if quantization else None
    alike = "experts" not in str(quantization)  # no rule tells experts apart

    def of(name: str) -> Stored:
        return of_one(_EXPERT.sub(".experts.0.", name) if alike else name)

    @cache
    def parameters() -> Parameters:
        return Parameters(ModelConfig.from_json(raw))

    @cache
    def of_one(name: str) -> Stored:
        if not quantization or (tensor := parameters().find(name)) is None or tensor.role not in PUBLISHED:
            return plain
        if method_of(quantization) == MXFP4:
            return Stored("mxfp4", MXFP4_GROUP) if tensor.expert is not None else plain
        module = name.removesuffix(".weight")
        scheme = layout.scheme(stored_name(module)) if layout else None
        # Mistral's files name ignored modules as Hugging Face does, although tensors have Mistral's names.
        if layout is None or scheme is None or layout.scheme(module) is None:
            return plain
        return _of_scheme(scheme)

    return of


def _of_scheme(scheme: Scheme, columns: int = 128) -> Stored:
    if scheme.format == "dense":
        return Stored("bfloat16")
    default = FP8_BLOCK if scheme.format == "fp8" else columns
    return Stored(scheme.format, scheme.group_size or default, not scheme.symmetric)


def stored_by_checkpoint(path: Path) -> StoredOf:
    """Formats of the files, read from their headers."""
    checkpoint = Checkpoint.open(path)
    stored_name = names_in(checkpoint, ModelConfig.from_json(checkpoint.config)).stored

    def of(parameter: str) -> Stored:
        name = stored_name(parameter)
        if found := checkpoint.in_groups(name):
            return Stored(*found)
        module = name.removesuffix(".weight")
        if scheme := checkpoint.scheme(module):
            return _of_scheme(scheme, checkpoint.stored_as(module)[1][1])
        if not checkpoint.has(name):
            name = stored_name(stack_of(parameter))
        if checkpoint.has(f"{name}_blocks"):
            return Stored("mxfp4", MXFP4_GROUP)
        if not checkpoint.has(name):
            return Stored("bfloat16")
        return Stored(_TENSORS.get(checkpoint.dtype(name), "int8"))

    return of


def held_by_experts(name: str, stored_of: StoredOf, experts: int) -> dict[Stored, float]:
    """The share of each format among a layer's experts in which backends hold a matrix; name: the first's."""
    found: Counter[Stored] = Counter()
    for e in range(experts):
        own = name.replace(".experts.0.", f".experts.{e}.")
        stored = stored_of(own)
        if "down_proj" not in name:  # gate and up are held in one format
            other = "up_proj" if "gate_proj" in name else "gate_proj"
            stored = _together(stored, stored_of(re.sub("(gate|up)_proj", other, own)))
        found[stored] += 1
    return {stored: count / experts for stored, count in found.items()}


def _together(a: Stored, b: Stored) -> Stored:
    """As `farthing.ops.weights.in_one_format`."""
    if (a.kind, a.group) == (b.kind, b.group):
        return replace(a, zero=a.zero or b.zero)
    if a.is_float or b.is_float or "fp8" in (a.kind, b.kind):
        return Stored("float32" if "float32" in (a.kind, b.kind) else "bfloat16")
    wider = any(INTEGERS[s.kind].minimums for s in (a, b))
    return Stored("int8_groups", WIDER if wider else gcd(a.group, b.group), a.zero or b.zero)


def matrix_bytes(n: int, k: int, stored: Stored) -> int:
    """Bytes as stored: data, scales and zero points."""
    if stored.is_float:
        return FLOAT_BYTES[stored.kind] * n * k
    if stored.kind == "fp8":
        return n * k + 4 * (-(-n // 128)) * (-(-k // 128))
    if stored.kind == "int8":
        return n * k + 4 * n
    integers = INTEGERS[stored.kind]
    numbers = 8 if integers.minimums else 5 if stored.zero else 4
    return n * k // (1 if integers.bits > 4 else 2) + n * (k // stored.group) * numbers


def packed_bytes(n: int, k: int, stored: Stored, quantization: str | None = None) -> int:
    """Bytes of the CPU backend's packed matrix."""
    try:
        from farthing.ops.cpu import formats
    except ImportError:  # no native module: an estimate
        return matrix_bytes(n, k, _rounded(stored, k, quantization))
    plan = formats.choose(stored.kind, k, stored.group, quantization)
    return formats.packed_bytes(n, k, plan, stored.zero)


@dataclass(frozen=True, slots=True)
class Holder:
    """How a backend converts stored weights."""

    backend: str  # reference, cpu or gpu
    item: int = 4  # bytes per activation, and per weight of the reference backend
    quantization: str | None = None  # round-to-nearest while loading
    # With `--deterministic`, halves of row-parallel matrices that a rank sums apart, 1 or 2. None without it.
    halves: int | None = None

    @property
    def parts(self) -> int:
        """Into which a rank divides row-parallel matrices."""
        return self.halves or 1

    def matrix(self, n: int, k: int, stored: Stored, mlp: bool = False) -> int:
        """A projection [N, K]; mlp: part of a feed-forward, 4 bits under `int4`; others get 8 bits."""
        if self.backend == "reference":
            return self.item * n * k
        stored = _divided(stored, k)
        if self.backend == "gpu":
            packed = self.rounded(stored, k, mlp)
            return self.item * n * k if packed.is_float else matrix_bytes(n, k, packed)
        return packed_bytes(n, k, stored, loaded_as(self.quantization, mlp))

    def heads(self, n: int, nope: int, value: int, latent: int, stored: Stored) -> int:
        """kv_b_proj of n heads: on the CPU packed per head, in int8 if weights are rounded; else floats."""
        if self.backend != "cpu":
            return self.item * n * (nope + value) * latent
        as_held = stored if stored.is_float else Stored("float32")
        quantization = "int8" if self.quantization or not stored.is_float else None
        return n * sum(
            packed_bytes(*shape, as_held, quantization) for shape in ((latent, nope), (value, latent))
        )

    def gate(self, n: int, k: int, stored: Stored) -> int:
        """The router's matrix, which is never rounded."""
        return packed_bytes(n, k, stored) if self.backend == "cpu" else 4 * n * k

    def rounds(self, stored: Stored) -> bool:
        """Whether `quantization` changes weights of this format."""
        return self.quantization is not None and (
            stored.is_float or (stored.kind == "fp8" and self.backend == "cpu")
        )

    def rounded(self, stored: Stored, k: int, mlp: bool) -> Stored:
        """The format after rounding while loading: of dense weights, and of FP8 ones on the CPU."""
        return _rounded(stored, k, loaded_as(self.quantization, mlp)) if self.rounds(stored) else stored


def _divided(stored: Stored, k: int) -> Stored:
    """As held if the last group of columns is cut off: with scales of smaller groups (`layout.spread`)."""
    if stored.kind not in ("int4", "int8_groups", "q5_0") or k % stored.group == 0:
        return stored
    group = group_within(stored.group, k)
    return replace(
        stored, kind="int8_groups" if stored.kind == "q5_0" and group % 32 else stored.kind, group=group
    )


def _rounded(stored: Stored, k: int, quantization: str | None) -> Stored:
    if quantization is None or stored.kind in INTEGERS:
        return stored
    if quantization == "int8":
        return Stored("int8")
    group = int4_group(k)
    return Stored("int4", group) if group else stored
