"""Matrices of GPTQ, AWQ and AutoRound: integers of 2, 3, 4 or 8 bits in 32-bit words, with zero points.

Legend: N rows, K columns, b bits, G groups of columns. AWQ's `gemm` and GPTQ store matrices transposed:

| | qweight int32 | qzeros int32 | scales | order in a word |
|---|---|---|---|---|
| gptq, gptq_v2 | [K b / 32, N] | [G, N b / 32] | [G, N] | ascending |
| gemm | [K, N b / 32] | [G, N b / 32] | [G, N] | even ones, then odd ones |
| gemv | [N, K b / 32] | [N, G b / 32], padded | [N, G], padded | ascending |

The first version of GPTQ stores zero points less one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.floats import ACTIVATION_SCALES, CACHE_SCALES, Fp8
from farthing.checkpoint.layout import (
    Layout,
    Parts,
    Scheme,
    expect,
    field,
    format_of,
    integers,
    packed_integers,
    pattern,
    strings,
    unpack,
)
from farthing.checkpoint.shards import CheckpointError
from farthing.ops import Format, Weight

if TYPE_CHECKING:
    from torch import Tensor

_WHERE = "config.json: quantization_config"
_BITS = (2, 3, 4, 8)
_ORDERS = {"gptq": 1, "gptq_v2": 0, "gemm": 0, "gemv": 0}  # and what zero points are stored less
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # where the integers of a word are


@dataclass(frozen=True, slots=True)
class Words:
    """How the toolkits store a matrix; see the table above."""

    order: str  # a key of _ORDERS
    bits: int
    columns: int | None  # that share a scale; None: all
    centered: bool  # zero points are half of the range

    @property
    def format(self) -> Format:
        """The format of what `read` returns."""
        return format_of(self.bits, self.columns, self.centered)

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale in it; None: all."""
        return self.columns

    @property
    def symmetric(self) -> bool:
        """Whether it has no zero points."""
        return self.centered

    def shape(self, parts: Parts) -> tuple[int, int]:
        """(N, K)."""
        first, second = parts.shape("qweight")
        if self.order == "gemm":
            return second * 32 // self.bits, first
        if self.order == "gemv":
            return first, second * 32 // self.bits
        columns = parts.shape("g_idx")[0] if parts.has("g_idx") else first * 32 // self.bits
        return second, columns

    def read(self, parts: Parts) -> Weight:
        """The matrix. A bias of zeros, which AutoGPTQ adds to every matrix, is skipped."""
        if parts.has("bias") and not bool(parts.tensor("bias").any()):
            parts.skip("bias")
        n, k = self.shape(parts)
        words, scale = parts.matrix("qweight", "int32"), parts.matrix("scales")
        groups = -(-k // (self.columns or k))
        if self.order == "gemv":
            u, scale = packed_integers(words, self.bits, k), scale[:, :groups]
        else:
            u = self._transposed(words, n, k)
            scale = scale.t()
        expect("scales", (n, groups), scale)
        order = parts.tensor("g_idx", "int32", "int64") if parts.has("g_idx") else None
        zero = self._zeros(parts, n, groups)
        return integers(self.bits, u, scale.contiguous(), zero, self.columns, order)

    def _transposed(self, words: Tensor, n: int, k: int) -> Tensor:
        if self.order != "gemm":
            expect("qweight", (-(-k * self.bits // 32), n), words)
            return packed_integers(words.t(), self.bits, k)
        u = _in_order(unpack(words, self.bits, n)).t()
        return u[:, ::2] | u[:, 1::2] << 4

    def _zeros(self, parts: Parts, n: int, groups: int) -> Tensor | None:
        """[N, G]; None if all are half of the range, as in every symmetric file."""
        words = parts.matrix("qzeros", "int32")
        less = _ORDERS[self.order]
        if less and self.bits != 3:  # the whole word, because those less than 0 borrowed from the next
            words = words + sum(1 << at for at in range(0, 32, self.bits)) * less
        if self.order == "gemv":
            zero = unpack(words, self.bits, groups)
        else:
            expect("qzeros", (groups, -(-n * self.bits // 32)), words)
            zero = unpack(words, self.bits, n)
            zero = (_in_order(zero) if self.order == "gemm" else zero).t()
        if less and self.bits == 3:
            zero = zero + less & 7
        middle = 1 << self.bits - 1
        return None if self.centered and bool((zero == middle).all()) else zero.contiguous()


def _in_order(u: Tensor) -> Tensor:
    """Columns of AWQ's words, as they are in the words, in ascending order."""
    ordered: Tensor = u.unflatten(1, (-1, len(_AWQ)))[..., _AWQ].flatten(1)
    return ordered


@dataclass(frozen=True, slots=True)
class Named:
    """A scheme for all modules but those that one of these rules, of which the first match counts, names."""

    base: Scheme | None
    rules: tuple[tuple[Callable[[str], object], Scheme | None], ...] = ()
    unread: Sequence[str] = (*ACTIVATION_SCALES, *CACHE_SCALES)

    def scheme(self, module: str) -> Scheme | None:
        """That of a Linear module; None: not quantized."""
        return next((scheme for matches, scheme in self.rules if matches(module)), self.base)


def _words(raw: Mapping[str, Any], order: str, symmetric: bool, where: str = _WHERE) -> Words:
    bits, group = field(raw, "bits", int, where), field(raw, "group_size", int, where)
    if bits not in _BITS or (order.startswith("gem") and bits != 4):
        accepted = "4" if order.startswith("gem") else "2, 3, 4 or 8"
        raise CheckpointError(f"{where}.bits: got {bits}; expected {accepted}")
    if group is None or not (group == -1 or 1 <= group <= 1 << 16):
        raise CheckpointError(f"{where}.group_size: got {group}; expected -1 or 1 to {1 << 16}")
    return Words(order, bits, None if group == -1 else group, symmetric)


def _order(raw: Mapping[str, Any], names: Sequence[str], default: str, accepted: Sequence[str]) -> str:
    """The order of words from the first of these fields."""
    name = next((n for n in names if raw.get(n) is not None), names[0])
    order = field(raw, name, str, _WHERE) or default
    if order.lower() not in accepted:
        raise CheckpointError(
            f"{_WHERE}.{name}: got {order[:80]!r}; expected {' or '.join(accepted)}, "
            "to which GPTQModel converts"
        )
    return order.lower()


def gptq(raw: Mapping[str, Any]) -> Layout:
    """Of GPTQModel, AutoGPTQ and Optimum. `dynamic` has fields of modules by regular expression; those that
    begin with '-:' are not quantized."""
    order = _order(raw, ("checkpoint_format", "format"), "gptq", ("gptq", "gptq_v2"))
    symmetric = field(raw, "sym", bool, _WHERE) is not False
    rules: list[tuple[Callable[[str], object], Scheme | None]] = []
    for key, change in (field(raw, "dynamic", dict, _WHERE) or {}).items():
        where = f"{_WHERE}.dynamic.{str(key)[:80]}"
        matches = pattern(re.sub(r"^[-+]:", "", str(key)), where).match
        if str(key).startswith("-:"):
            rules.append((matches, None))
            continue
        fields = {**raw, **(change if isinstance(change, dict) else {})}
        own = field(fields, "sym", bool, where)
        rules.append((matches, _words(fields, order, own is not False, where)))
    return Named(_words(raw, order, symmetric), tuple(rules))


def awq(raw: Mapping[str, Any]) -> Layout:
    """Of AutoAWQ and GPTQModel. `modules_to_not_convert` are parts of names."""
    order = _order(raw, ("version", "checkpoint_format", "format"), "gemm", ("gemm", "gemv"))
    fields = {"bits": raw.get("w_bit"), "group_size": raw.get("q_group_size")} | dict(raw)
    kept = strings(raw, "modules_to_not_convert", _WHERE)
    rules = ((lambda module: any(part in module for part in kept), None),)
    return Named(_words(fields, order, field(raw, "zero_point", bool, _WHERE) is False), rules)


# AutoRound's packing_format -> order of words.
_PACKING = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "gemm",
    "auto_round:awq": "gemm",
    "auto_round": "gptq_v2",
    "auto": "gptq",
}


def auto_round(raw: Mapping[str, Any]) -> Layout:
    """AutoRound's own format. `extra_config` has fields of modules by name or regular expression."""
    if raw.get("rotation_config"):
        raise CheckpointError(
            f"{_WHERE}.rotation_config: rotates activations while the model runs, which is not supported; "
            "expected a model quantized without rotation"
        )
    rules: list[tuple[Callable[[str], object], Scheme | None]] = []
    extra = field(raw, "extra_config", dict, _WHERE) or {}
    for key in sorted(extra, key=lambda key: re.escape(key) != key.replace(".", r"\.")):  # names first
        where = f"{_WHERE}.extra_config.{key[:80]}"
        change = field(extra, key, dict, f"{_WHERE}.extra_config") or {}
        matches = pattern(key, where).fullmatch
        rules.append((matches, _rounded({**raw, **change}, where)))
    return Named(_rounded(raw, _WHERE), tuple(rules))


def _rounded(raw: Mapping[str, Any], where: str) -> Scheme | None:
    bits, kind = field(raw, "bits", int, where), field(raw, "data_type", str, where) or "int"
    if bits is None or bits > 8:
        return None
    if kind.startswith("fp") and bits == 8 and raw.get("fmt", "e4m3") == "e4m3":  # blocks are a list of two
        return Fp8.from_json(raw)
    group = field(raw, "group_size", int, where)
    if kind == "int":
        packing = field(raw, "packing_format", str, where) or "auto"
        if packing not in _PACKING:
            raise CheckpointError(
                f"{where}.packing_format: got {packing[:80]!r}; expected {' or '.join(_PACKING)}"
            )
        return _words(raw, _PACKING[packing], field(raw, "sym", bool, where) is not False, where)
    if kind.startswith("mx_fp") and bits == 4 and group == 32:
        return ct.Scheme("mxfp4-pack-quantized", 4, True, "group", 32, floating=True)
    if kind.startswith("mx_fp") and bits == 8 and group == 32:
        return ct.Scheme("mxfp8-quantized", 8, True, "group", 32, floating=True)
    if kind.startswith("nv_fp") and bits == 4 and group == 16:
        return ct.Scheme("nvfp4-pack-quantized", 4, True, "tensor_group", 16, floating=True)
    raise CheckpointError(
        f"{where}: got data_type {kind[:40]!r} with {bits} bits in groups of {group}; expected int, nv_fp of "
        "4 bits in groups of 16, mx_fp of 4 or 8 bits in groups of 32, or fp of 8 bits in e4m3"
    )
