"""What a toolkit's layout of quantized matrices is: a `Layout` names each matrix's `Scheme`, which reads it.

Legend: N rows, K columns, g columns that share a scale, u stored unsigned integers of b bits, z zero points;
a value is (u - z) scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any, Protocol

from farthing.checkpoint.shards import CheckpointError
from farthing.lazy import torch
from farthing.ops import Format, Weight, dtype_name, pack_int4

if TYPE_CHECKING:
    from torch import Tensor


class TensorSource(Protocol):
    """The interface `Parts` needs from a checkpoint."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        ...

    def has(self, name: str) -> bool:
        """Whether a tensor of this full name exists."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A tensor, which counts as used; raises CheckpointError if it is missing."""
        ...

    def input_scale(self, module: str) -> float:
        """The calibrated scale of a module's input."""
        ...


class Parts:
    """The tensors of one module, by suffix."""

    def __init__(self, source: TensorSource, module: str) -> None:
        self._source, self.module = source, module

    def beside(self, name: str) -> Parts:
        """The tensors of another module of the same parent."""
        return Parts(self._source, f"{self.module.rpartition('.')[0]}.{name}")

    def setting(self, name: str) -> Any:
        """A field of config.json; None without it."""
        return self._source.config.get(name)

    def has(self, suffix: str) -> bool:
        """Whether there is one with this suffix."""
        return self._source.has(f"{self.module}.{suffix}")

    def shape(self, suffix: str) -> tuple[int, ...]:
        """Its shape, from the header."""
        return self._source.shape(f"{self.module}.{suffix}")

    def tensor(self, suffix: str, *dtypes: str) -> Tensor:
        """It, which counts as used. Raises CheckpointError if it is missing or has none of these dtypes."""
        tensor = self._source.tensor(f"{self.module}.{suffix}")
        if dtypes and dtype_name(tensor.dtype) not in dtypes:
            raise CheckpointError(f"{suffix}: expected {' or '.join(dtypes)}, found {tensor.dtype}")
        return tensor

    def matrix(self, suffix: str, *dtypes: str) -> Tensor:
        """`tensor`, which must have two dimensions."""
        tensor = self.tensor(suffix, *dtypes)
        if tensor.ndim != 2:
            raise CheckpointError(f"{suffix}: expected a matrix, found shape {list(tensor.shape)}")
        return tensor

    def skip(self, *suffixes: str) -> None:
        """Count tensors as used that need not be read; they may be missing."""
        for suffix in filter(self.has, suffixes):
            self.tensor(suffix)

    def input_scale(self) -> float:
        """The calibrated scale of the module's input."""
        return self._source.input_scale(self.module)


class Scheme(Protocol):
    """How one matrix is stored."""

    @property
    def format(self) -> Format:
        """The format of what `read` returns."""
        ...

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None: a whole row, or what the format says."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        ...

    def shape(self, parts: Parts) -> tuple[int, int]:
        """(N, K), from headers where they say."""
        ...

    def read(self, parts: Parts) -> Weight:
        """The matrix. Raises CheckpointError without file and module; the reader adds them."""
        ...


class Layout(Protocol):
    """What a configuration says about the quantization of a model."""

    @property
    def unread(self) -> Sequence[str]:
        """Patterns of tensors that are not read."""
        ...

    def scheme(self, module: str) -> Scheme | None:
        """How a Linear module is stored; None: not quantized."""
        ...


# Checked access to a configuration's fields.

_KINDS = {str: "a string", int: "a whole number", dict: "an object", list: "a list", bool: "true or false"}


def field(source: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a configuration, None where it is missing or null. Raises CheckpointError for others."""
    value = source.get(name)
    if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    raise CheckpointError(f"{where}.{name[:80]}: got {str(value)[:80]!r}; expected {_KINDS[kind]}")


def strings(source: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A field that is a list of strings, empty where it is missing or null."""
    names = field(source, name, list, where) or []
    if not all(isinstance(each, str) for each in names):
        raise CheckpointError(f"{where}.{name}: got {str(names)[:80]!r}; expected a list of strings")
    return tuple(names)


def pattern(text: str, where: str) -> re.Pattern[str]:
    """A regular expression of a configuration; `where` names its field."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where} names {text[:80]!r}, which is not a valid pattern: {error}") from None


def expect(suffix: str, shape: tuple[int, ...], tensor: Tensor) -> None:
    """Raise CheckpointError unless `tensor` has `shape`."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{suffix}: expected shape {list(shape)}, found {list(tensor.shape)}")


# Integers of 2 to 8 bits.


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, W], each row a stream of integers of so many bits, lowest first -> the first ones, uint8
    [R, count]."""
    data = words.flatten().view(torch.uint8).view(len(words), -1)  # a row stride of 1 cannot be viewed
    if bits == 8:
        return data[:, :count]
    eights = torch.nn.functional.pad(data, (0, -data.shape[1] % bits)).unflatten(1, (-1, bits)).long()
    value = sum((eights[..., i] << 8 * i for i in range(bits)), torch.zeros_like(eights[..., 0]))
    parts = [(value >> bits * i & (1 << bits) - 1).to(torch.uint8) for i in range(8)]
    return torch.stack(parts, -1).flatten(1)[:, :count]


def pack_stream(u: Tensor, bits: int) -> Tensor:
    """Integers [R, K] as streams of bits, lowest first: uint8 [R, bits ceil(K / 8)]."""
    eights = torch.nn.functional.pad(u, (0, -u.shape[1] % 8)).unflatten(1, (-1, 8)).long()
    value = sum((eights[..., i] << bits * i for i in range(8)), torch.zeros_like(eights[..., 0]))
    return torch.stack([value >> 8 * i & 255 for i in range(bits)], -1).flatten(1).to(torch.uint8)


def packed_integers(words: Tensor, bits: int, count: int) -> Tensor:
    """As `unpack`, but two integers of 4 bits stay in a byte, as `integers` takes them."""
    return unpack(words, 8, count // 2) if bits == 4 else unpack(words, bits, count)


def format_of(bits: int, group_size: int | None, symmetric: bool) -> Format:
    """The format of what `integers` returns: up to 4 bits are held in 4, others in 8 but for groups of 5."""
    if bits == 5 and symmetric and group_size and group_size % 32 == 0:
        return "q5_0"
    return "int4" if bits <= 4 else "int8" if symmetric and not group_size else "int8_groups"


def integers(
    bits: int,
    u: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int | None,
    order: Tensor | None = None,
) -> Weight:
    """A matrix of u [N, K] uint8, or of 4 bits [N, K/2] two in a byte, the even column low; scale [N, K/g];
    zero as scale, or None: half of the range. order [K]: each column's group; None: adjacent ones share one.
    """
    n, k = u.shape[0], u.shape[1] * (2 if bits == 4 else 1)
    group, middle = group_size or k, 1 << bits - 1
    expect("weight_scale", (n, -(-k // group)), scale)
    scale = scale.float()
    if order is not None and not torch.equal(order.long(), torch.arange(k) // group):
        ordered = _sorted(order.long(), k, group, scale.shape[1])
        u = torch.stack((u & 15, u >> 4), -1).flatten(1)[:, ordered] if bits == 4 else u[:, ordered]
        u = u[:, ::2] | u[:, 1::2] << 4 if bits == 4 else u
        return replace(integers(bits, u, scale, zero, group_size), order=ordered)
    if zero is None and bits > 4 and not group_size:
        return Weight("int8", _signed(u, middle), scale)
    offset = middle if zero is None or bits > 4 else 8
    points = None if zero is None else spread(_signed(zero, offset), group, k).contiguous()
    data = u.contiguous() if bits == 4 else _signed(u, offset)
    data = pack_int4(data) if bits < 4 else data
    scale = spread(scale, group, k).contiguous()
    return Weight(format_of(bits, k // scale.shape[1], zero is None), data, scale, points)


def spread(numbers: Tensor, group: int, k: int) -> Tensor:
    """Numbers [N, ceil(K/g)] of groups, of which the last may be cut off, as those of groups of one size that
    kernels read, if there is one: 16, 32 or a multiple of 64."""
    size = group_within(group, k)
    return numbers if size == group else numbers[:, torch.arange(0, k, size) // group]


def group_within(group: int, k: int) -> int:
    """The largest size that kernels read and that divides groups and columns; their divisor if none is."""
    most = gcd(group, k)
    return next((d for d in range(most, 15, -1) if most % d == 0 and (64 % d == 0 or d % 64 == 0)), most)


def _signed(u: Tensor, offset: int) -> Tensor:
    return (u.to(torch.int16) - offset).to(torch.int8)


GROUP_INDICES = ("g_idx", "weight_g_idx")  # suffixes of the group of each column: GPTQ, compressed-tensors


def order_of(groups: Tensor) -> Tensor | None:
    """The columns of a matrix, sorted by their groups; None if they are. groups: each column's, [K]."""
    ascending = bool((groups[1:] >= groups[:-1]).all())
    return None if ascending else groups.argsort(stable=True)


def _sorted(order: Tensor, k: int, group: int, groups: int) -> Tensor:
    """The columns of each group after those of the one before, [K]; order: each column's group. Groups are of
    one size, but the last may be cut off."""
    expect("g_idx", (k,), order)
    if not bool(((order >= 0) & (order < groups)).all()):
        raise CheckpointError(f"g_idx: found a group outside 0 to {groups - 1}")
    counts = torch.bincount(order, minlength=groups)
    if bool((counts[:-1] != group).any()):
        raise CheckpointError(
            f"g_idx: found groups of {counts.tolist()[:8]} columns; expected {group} in each"
        )
    found: Tensor = order.argsort(stable=True)
    return found
