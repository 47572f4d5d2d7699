"""Read the compressed-tensors format (0.20): W8A8, W4A16 and FP8 by block or matrix -> `Weight`.

Legend: N rows, K columns, g group size. Element i of a packed row sits at bit 4 i of its little-endian
words, as u = q + 8; zero points are packed the same way along dimension 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.error import CheckpointError
from farthing.checkpoint.fp8 import block_scales
from farthing.lazy import torch
from farthing.ops.weights import FP8_BLOCK, Weight, pack_int4

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "compressed-tensors"
_MOST_GROUP = 1 << 16
# Suffixes a quantized module may have besides its weight.
OPTIONAL = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "input_clip",
    "qscale_act",
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of one config group are stored."""

    storage: str  # int-quantized | pack-quantized | float-quantized
    bits: int
    symmetric: bool
    strategy: str  # tensor | channel | group | block
    group_size: int | None
    input_bits: int = 8  # below 8 for some quantization-aware trained checkpoints
    static_inputs: bool = False  # inputs are quantized with each matrix's calibrated `input_scale`
    fp8: bool = False  # float8_e4m3fn, not integers

    def __str__(self) -> str:
        return f"{self.storage} {self.bits} bit {self.strategy}"


@dataclass(frozen=True, slots=True)
class Targets:
    """Module patterns of compressed-tensors: exact names, 're:' regexes, or the class 'Linear'."""

    names: Mapping[str, int]
    regexes: tuple[tuple[re.Pattern[str], int], ...]
    linear: int | None

    @classmethod
    def of(cls, groups: Iterable[Iterable[str]]) -> Targets:
        """The patterns of each group, by group index."""
        names: dict[str, int] = {}
        regexes: list[tuple[re.Pattern[str], int]] = []
        linear: int | None = None
        for i, patterns in enumerate(groups):
            for pattern in patterns:
                if pattern.startswith("re:"):
                    regexes.append((_regex(pattern[3:]), i))
                elif pattern == "Linear":
                    linear = i if linear is None else linear
                else:
                    names.setdefault(pattern, i)
        return cls(names, tuple(regexes), linear)

    def match(self, module: str) -> int | None:
        """The group of a Linear module; names take precedence over regexes, regexes over the class."""
        if module in self.names:
            return self.names[module]
        return next((i for regex, i in self.regexes if regex.match(module)), self.linear)


@dataclass(frozen=True, slots=True)
class Groups:
    """The scheme of each module, from `config.json["quantization_config"]`."""

    schemes: tuple[Scheme, ...]
    targets: Targets
    ignore: Targets

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Groups:
        """Validate and convert. Raises CheckpointError for any scheme without an implementation."""
        where = "config.json: quantization_config"
        default = _field(raw, "format", str, where) or "dense"
        groups = _field(raw, "config_groups", dict, where)
        if groups is None:
            raise CheckpointError(f"{where}.config_groups is missing; expected an object")
        schemes, targets = [], []
        for name in groups:
            group = _field(groups, name, dict, f"{where}.config_groups") or {}
            schemes.append(_scheme(f"{where}.config_groups.{name[:80]}", group, default))
            targets.append(_names(group, "targets", f"{where}.config_groups.{name[:80]}"))
        return cls(tuple(schemes), Targets.of(targets), Targets.of([_names(raw, "ignore", where)]))

    def index(self, module: str) -> int | None:
        """The index of a Linear module's config group; None if it is ignored or not targeted."""
        return None if self.ignore.match(module) is not None else self.targets.match(module)

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a Linear module; None if it stays dense."""
        index = self.index(module)
        return None if index is None else self.schemes[index]


_KINDS = {str: "a string", int: "a whole number", dict: "an object", list: "a list"}


def _field(source: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a configuration, None where it is missing or null. Raises CheckpointError for others."""
    value = source.get(name)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise CheckpointError(f"{where}.{name[:80]}: got {str(value)[:80]!r}; expected {_KINDS[kind]}")


def _names(source: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    names = _field(source, name, list, where) or []
    if not all(isinstance(each, str) for each in names):
        raise CheckpointError(f"{where}.{name}: got {str(names)[:80]!r}; expected a list of strings")
    return tuple(names)


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"config.json: quantization_config names 're:{text[:80]}', which is not a valid pattern: {error}"
        ) from None


def _scheme(where: str, group: Mapping[str, Any], default: str) -> Scheme:
    weights = _field(group, "weights", dict, where)
    if weights is None:
        raise CheckpointError(f"{where}.weights is missing; expected an object")
    storage = _field(group, "format", str, where) or default
    bits = _field(weights, "num_bits", int, f"{where}.weights")
    kind = _field(weights, "type", str, f"{where}.weights") or "int"
    group_size = _field(weights, "group_size", int, f"{where}.weights")
    strategy = _field(weights, "strategy", str, f"{where}.weights") or ("group" if group_size else "tensor")
    inputs = _field(group, "input_activations", dict, where) or {}
    input_bits = _field(inputs, "num_bits", int, f"{where}.input_activations")
    coarse = inputs.get("type", "int") == "int" and input_bits is not None and input_bits < 8
    if coarse and (inputs.get("strategy"), inputs.get("group_size")) != ("group", group_size):
        raise CheckpointError(
            f"{where}.input_activations: got {str(inputs)[:200]}; "
            "expected the weights' own groups below 8 bits"
        )
    if strategy == "group" and (group_size is None or not 1 <= group_size <= _MOST_GROUP):
        raise CheckpointError(f"{where}.weights.group_size: got {group_size}; expected 1 to {_MOST_GROUP}")
    if not isinstance(symmetric := weights.get("symmetric", True), bool):
        raise CheckpointError(
            f"{where}.weights.symmetric: got {str(symmetric)[:80]!r}; expected true or false"
        )
    scheme = Scheme(
        storage, bits or 0, symmetric, strategy, group_size,
        input_bits if coarse else 8, _is_static(inputs), kind == "float",
    )  # fmt: skip
    supported = {
        ("int-quantized", 8, "int"): ("tensor", "channel"),
        ("int-quantized", 4, "int"): ("tensor", "channel", "group"),
        ("pack-quantized", 4, "int"): ("tensor", "channel", "group"),
        ("pack-quantized", 8, "int"): ("tensor", "channel"),
        ("naive-quantized", 8, "int"): ("tensor", "channel"),
        ("float-quantized", 8, "float"): ("tensor", "block"),
        ("naive-quantized", 8, "float"): ("tensor", "block"),
    }
    if strategy not in supported.get((storage, scheme.bits, kind), ()):
        known = ", ".join(sorted(f"{f} {b} bit {k} {'|'.join(s)}" for (f, b, k), s in supported.items()))
        raise CheckpointError(
            f"{where}: unknown quantization {storage} {bits} bit {kind} {strategy} (format, num_bits, type, "
            f"strategy); expected {known}"
        )
    if scheme.bits == 8 and not scheme.symmetric:
        raise CheckpointError(f"{where}: asymmetric 8-bit weights are unknown; expected symmetric")
    block = _field(weights, "block_structure", list, f"{where}.weights")
    if strategy == "block" and block != [FP8_BLOCK, FP8_BLOCK]:
        raise CheckpointError(f"{where}.block_structure: got {block}; expected [128, 128]")
    return scheme


def _is_static(inputs: Mapping[str, Any]) -> bool:
    """Whether inputs are symmetric INT8 with one calibrated scale. Others are quantized dynamically."""
    wanted = {"type": "int", "num_bits": 8, "strategy": "tensor", "symmetric": True}
    given = {"type": "int", "strategy": "tensor", "symmetric": True, **inputs}
    return bool(inputs) and not inputs.get("dynamic") and all(given.get(k) == v for k, v in wanted.items())


def decode(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Weight:
    """A module's tensors by suffix ('weight', 'weight_packed', 'weight_scale', …) -> Weight.

    Raises CheckpointError without file and module; the reader adds them.
    """
    scale = tensors["weight_scale"].float()
    if scheme.storage == "pack-quantized":
        n, k = (int(x) for x in tensors["weight_shape"].tolist())
        expect("weight_packed", (n, -(-k * scheme.bits // 32)), tensors["weight_packed"])
        data = tensors["weight_packed"].contiguous().view(torch.uint8)
    else:
        n, k = tensors["weight"].shape
        data = tensors["weight"]
    if scheme.fp8:
        return Weight("fp8", data, block_scales("weight_scale", scale, (n, k)))
    if scheme.bits == 8:
        if scheme.storage == "pack-quantized":
            data = (data[:, :k].to(torch.int16) - 128).to(torch.int8)
        return Weight("int8", data, _rows(scale, n))
    nibbles = data[:, : k // 2] if scheme.storage == "pack-quantized" else pack_int4(data)
    return _int4(scheme, nibbles, _rows(scale, n) if scheme.strategy != "group" else scale, n, k, tensors)


def _int4(
    scheme: Scheme, nibbles: Tensor, scale: Tensor, n: int, k: int, tensors: Mapping[str, Tensor]
) -> Weight:
    g = scheme.group_size if scheme.strategy == "group" and scheme.group_size else k
    if k % g or k % 2:
        raise CheckpointError(
            f"K = {k} with group_size {g}; expected an even K that is a multiple of the group size"
        )
    expect("weight_scale", (n, k // g), scale)
    order = tensors.get("weight_g_idx")
    if order is not None and not torch.equal(order.long(), torch.arange(k) // g):
        raise CheckpointError(
            "weight_g_idx permutes the columns; expected actorder 'static' or 'weight', or none"
        )
    if scheme.symmetric:
        return Weight("int4", nibbles.contiguous(), scale)
    zero = tensors["weight_zero_point"]
    if zero.dtype == torch.int32:
        expect("weight_zero_point", (-(-n // 8), k // g), zero)
        zero = _unpack_rows(zero, n)
    expect("weight_zero_point", (n, k // g), zero)
    return Weight("int4", nibbles.contiguous(), scale, zero.to(torch.int8))


def expect(suffix: str, shape: tuple[int, ...], tensor: Tensor) -> None:
    """Raise CheckpointError unless `tensor` has `shape`."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{suffix}: expected shape {list(shape)}, found {list(tensor.shape)}")


def _rows(scale: Tensor, n: int) -> Tensor:
    """Tensor or channel scales -> [N, 1]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(n, 1).contiguous()
    if scale.numel() != n:
        raise CheckpointError(
            f"weight_scale: expected {n} rows or one number, found shape {list(scale.shape)}"
        )
    return scale.reshape(n, 1)


def _unpack_rows(words: Tensor, n: int) -> Tensor:
    """int32 [ceil(N/8), G] packed along rows -> int8 [N, G]."""
    nibbles = words.t().contiguous().view(torch.uint8)  # [G, 4 * words]
    pairs = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1)[:, :n]
    return (pairs.to(torch.int8) - 8).t().contiguous()
