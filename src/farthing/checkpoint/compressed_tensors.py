"""The compressed-tensors format (0.20) in both directions.

Legend: N rows, K columns, g group size. Element i of a packed row of b bits sits at bit b i of its
little-endian words, as u = q + 2^(b - 1); zero points are packed the same way along dimension 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.floats import CACHE_SCALES, E2M3, fp4, fp8, ue8m0
from farthing.checkpoint.layout import (
    Parts,
    expect,
    field,
    format_of,
    integers,
    pack_stream,
    packed_integers,
    pattern,
    strings,
    unpack,
)
from farthing.checkpoint.shards import CheckpointError
from farthing.lazy import torch
from farthing.ops.weights import CODES, FP8_BLOCK, INTEGERS, Format, InputRounding, Weight

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
    "input_global_scale",
    "input_clip",
    "qscale_act",
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of one config group are stored."""

    storage: str  # a key of _STORAGES
    bits: int
    symmetric: bool
    strategy: str  # tensor | channel | group | tensor_group | block
    group_size: int | None
    input_bits: int = 8  # below 8 for some quantization-aware trained checkpoints
    static_inputs: bool = False  # inputs are quantized with each matrix's calibrated `input_scale`
    floating: bool = False  # FP8, FP6 or FP4, not integers
    block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)  # of the strategy

    def __str__(self) -> str:
        return f"{self.storage} {self.bits} bit {self.strategy}"

    @property
    def packed(self) -> bool:
        """Whether integers are in 32-bit words."""
        return self.storage == "pack-quantized"

    @property
    def format(self) -> Format:
        """The format of what `read` returns."""
        if self.floating:
            return _FLOATS[self.bits]
        return format_of(self.bits, self.group_size, self.symmetric)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """(N, K); of packed integers, from a tensor."""
        if self.packed:
            n, k = (int(x) for x in parts.tensor("weight_shape", "int64", "int32").tolist())
        elif self.floating and self.bits < 8:
            n, k = parts.shape("weight_packed")
            k = k * 8 // self.bits
        else:
            n, k = parts.shape("weight")
        return n, k

    def read(self, parts: Parts) -> Weight:
        """The matrix and how its inputs are rounded."""
        parts.skip(*OPTIONAL)
        if self.floating:
            weight = {8: self._fp8, 6: self._fp6, 4: self._fp4}[self.bits](parts)
        else:
            weight = self._integers(parts)
        if self.static_inputs:
            return replace(weight, inputs=InputRounding(8, scale=parts.input_scale()))
        if self.input_bits == 8:
            return weight
        clip = float(parts.tensor("input_clip")) if parts.has("input_clip") else 1.0
        return replace(weight, inputs=InputRounding(self.input_bits, clip))

    def _fp8(self, parts: Parts) -> Weight:
        block = (1, self.group_size) if self.group_size else self.block
        return fp8(parts.matrix("weight", "float8_e4m3fn"), parts, block)

    def _fp6(self, parts: Parts) -> Weight:
        """Every value of E2M3 is a multiple of 1/8, up to 60/8."""
        n, k = self.shape(parts)
        scale = ue8m0(parts.tensor("weight_scale", "uint8"))
        expect("weight_scale", (n, -(-k // (self.group_size or k))), scale)
        codes = unpack(parts.matrix("weight_packed", "uint8"), 6, k)
        return Weight("int8_groups", torch.tensor(E2M3, dtype=torch.int8)[codes.long()], scale / 8)

    def _fp4(self, parts: Parts) -> Weight:
        assert self.group_size is not None
        scale = ue8m0(parts.tensor("weight_scale"))
        if self.strategy == "tensor_group":
            scale = scale / parts.tensor("weight_global_scale").float()
        return fp4(parts.matrix("weight_packed", "uint8"), scale, self.group_size)

    def _integers(self, parts: Parts) -> Weight:
        if self.packed:
            n, k = self.shape(parts)
            words = parts.tensor("weight_packed", "int32")
            expect("weight_packed", (n, -(-k * self.bits // 32)), words)
            u = packed_integers(words, self.bits, k)
        else:
            q = parts.matrix("weight", "int8")
            n, k = q.shape
            u = (q.to(torch.int16) + (1 << self.bits - 1)).to(torch.uint8)
            u = u[:, ::2] | u[:, 1::2] << 4 if self.bits == 4 and k % 2 == 0 else u
        if k % 2 and self.bits <= 4:
            raise CheckpointError(f"weight_scale: found {k} columns; expected an even number")
        scale = parts.tensor("weight_scale").float()
        scale = scale if self.group_size else _rows(scale, n)
        order = parts.tensor("weight_g_idx") if parts.has("weight_g_idx") else None
        return integers(self.bits, u, scale, self._zeros(parts, scale), self.group_size, order)

    def _zeros(self, parts: Parts, scale: Tensor) -> Tensor | None:
        """Zero points as unsigned integers."""
        if self.symmetric:
            return None
        zero = parts.tensor("weight_zero_point", "int32", "int8")
        if zero.dtype == torch.int8:
            expect("weight_zero_point", tuple(scale.shape), zero)
            return (zero.to(torch.int16) + (1 << self.bits - 1)).to(torch.uint8)
        expect("weight_zero_point", (-(-scale.shape[0] * self.bits // 32), scale.shape[1]), zero)
        return unpack(zero.t(), self.bits, scale.shape[0]).t()


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
        for i, targets in enumerate(groups):
            for target in targets:
                if target.startswith("re:"):
                    regexes.append((pattern(target[3:], "config.json: quantization_config"), i))
                elif target == "Linear":
                    linear = i if linear is None else linear
                else:
                    names.setdefault(target, i)
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
        _refuse_online_transforms(where, raw)
        default = field(raw, "format", str, where) or "dense"
        groups = field(raw, "config_groups", dict, where)
        if groups is None:
            raise CheckpointError(f"{where}.config_groups is missing; expected an object")
        schemes, targets = [], []
        for name in groups:
            group = field(groups, name, dict, f"{where}.config_groups") or {}
            schemes.append(_scheme(f"{where}.config_groups.{name[:80]}", group, default))
            targets.append(strings(group, "targets", f"{where}.config_groups.{name[:80]}"))
        return cls(tuple(schemes), Targets.of(targets), Targets.of([strings(raw, "ignore", where)]))

    @property
    def unread(self) -> Sequence[str]:
        """Calibrated scales of queries, keys and values."""
        return CACHE_SCALES

    def index(self, module: str) -> int | None:
        """The index of a Linear module's config group; None if it is ignored or not targeted."""
        return None if self.ignore.match(module) is not None else self.targets.match(module)

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a Linear module; None if it stays dense."""
        index = self.index(module)
        return None if index is None else self.schemes[index]


def _refuse_online_transforms(where: str, raw: Mapping[str, Any]) -> None:
    """Rotations of weights are stored applied; those of activations would have to be computed."""
    config = field(raw, "transform_config", dict, where) or {}
    groups = field(config, "config_groups", dict, f"{where}.transform_config") or {}
    for name in groups:
        at = f"{where}.transform_config.config_groups.{name[:80]}"
        for apply in (
            field(
                field(groups, name, dict, f"{where}.transform_config.config_groups") or {}, "apply", list, at
            )
            or []
        ):
            location = apply.get("location") if isinstance(apply, dict) else apply
            if location not in ("weight_input", "weight_output"):
                raise CheckpointError(
                    f"{at}: rotates activations while the model runs (location {str(location)[:40]!r}); "
                    "that is not supported; expected rotations merged into weights, such as llm-compressor's "
                    "SpinQuant with R1 and R2; quantize the model again with these or none"
                )


# Bits of floating-point numbers -> format.
_FLOATS: Mapping[int, Format] = {8: "fp8", 6: "int8_groups", 4: "mxfp4"}
# (format, type, bits) -> strategies.
_STORAGES = {
    ("int-quantized", "int", (2, 3, 4, 5, 6, 7, 8)): ("tensor", "channel", "group"),
    ("pack-quantized", "int", (2, 3, 4, 5, 6, 7, 8)): ("tensor", "channel", "group"),
    ("naive-quantized", "int", (8,)): ("tensor", "channel", "group"),
    ("float-quantized", "float", (8,)): ("tensor", "channel", "group", "block"),
    ("naive-quantized", "float", (8,)): ("tensor", "channel", "group", "block"),
    ("mxfp8-quantized", "float", (8,)): ("group",),
    ("mxfp6-pack-quantized", "float", (6,)): ("group",),
    ("mxfp4-pack-quantized", "float", (4,)): ("group",),
    ("nvfp4-pack-quantized", "float", (4,)): ("tensor_group",),
}


def _scheme(where: str, group: Mapping[str, Any], default: str) -> Scheme:
    weights = field(group, "weights", dict, where)
    if weights is None:
        raise CheckpointError(f"{where}.weights is missing; expected an object")
    storage = field(group, "format", str, where) or default
    bits = field(weights, "num_bits", int, f"{where}.weights")
    kind = field(weights, "type", str, f"{where}.weights") or "int"
    group_size = field(weights, "group_size", int, f"{where}.weights")
    strategy = field(weights, "strategy", str, f"{where}.weights") or ("group" if group_size else "tensor")
    accepted = next((s for (f, t, b), s in _STORAGES.items() if (f, t) == (storage, kind) and bits in b), ())
    if strategy not in accepted:
        known = ", ".join(
            f"{f} {'|'.join(map(str, b))} bit {t} {'|'.join(s)}" for (f, t, b), s in sorted(_STORAGES.items())
        )
        raise CheckpointError(
            f"{where}: unknown quantization {storage} {bits} bit {kind} {strategy} (format, num_bits, type, "
            f"strategy); expected {known}"
        )
    grouped = strategy in ("group", "tensor_group")
    if grouped and (group_size is None or not 1 <= group_size <= _MOST_GROUP):
        raise CheckpointError(f"{where}.weights.group_size: got {group_size}; expected 1 to {_MOST_GROUP}")
    input_bits, static = _inputs(where, group, group_size)
    symmetric = field(weights, "symmetric", bool, f"{where}.weights")
    return Scheme(
        storage, bits, symmetric is not False, strategy, group_size if grouped else None,
        input_bits, static, kind == "float", _block(where, weights, strategy),
    )  # fmt: skip


def _inputs(where: str, group: Mapping[str, Any], group_size: int | None) -> tuple[int, bool]:
    """Bits of the inputs if below 8, else 8, and whether their scale is calibrated. Fewer bits are rounded to
    only in the weights' own groups; a token's other inputs have 8, and FP8 and FP4 stay floats."""
    inputs = field(group, "input_activations", dict, where) or {}
    bits = field(inputs, "num_bits", int, f"{where}.input_activations")
    coarse = inputs.get("type", "int") == "int" and bits is not None and bits < 8
    shared = (inputs.get("strategy"), inputs.get("group_size")) == ("group", group_size)
    return bits if coarse and shared else 8, is_static(inputs)


def _block(where: str, weights: Mapping[str, Any], strategy: str) -> tuple[int, int]:
    block = field(weights, "block_structure", list, f"{where}.weights")
    if strategy != "block":
        return FP8_BLOCK, FP8_BLOCK
    if not block or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block) or block[1] % 32:
        raise CheckpointError(
            f"{where}.block_structure: got {str(block)[:80]}; expected rows and columns, these a multiple of "
            "32"
        )
    return block[0], block[1]


def is_static(inputs: Mapping[str, Any]) -> bool:
    """Whether inputs are symmetric INT8 with one calibrated scale. Others are quantized dynamically."""
    wanted = {"type": "int", "num_bits": 8, "strategy": "tensor", "symmetric": True}
    scheme = {"type": "int", "strategy": "tensor", "symmetric": True, **inputs}
    return bool(inputs) and not inputs.get("dynamic") and all(scheme.get(k) == v for k, v in wanted.items())


def _rows(scale: Tensor, n: int) -> Tensor:
    """Tensor or channel scales -> [N, 1]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(n, 1).contiguous()
    if scale.numel() != n:
        raise CheckpointError(
            f"weight_scale: expected {n} rows or one number, found shape {list(scale.shape)}"
        )
    return scale.reshape(n, 1)


# Fitted values (NL4, the CODES of `farthing.ops.weights`) in files of 4-bit integers with even steps. The
# integer is 7 minus the place among CODES, so that zero is zero, and its scale is STEP times as large, so
# that the steps are about as far apart. Other programs thus read evenly spaced values near ours; we find
# what the integers stand for in the section MARK of config.json. Scales have the 8 bits of bfloat16, which
# survive the multiplication by STEP in float16.
STEP = -13.5
MARK = "farthing"


VALUES: dict[str, Any] = {"int4_values": list(CODES), "int4_step": STEP}


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as they are after being written and read."""
    return _read_scale(_written_scale(scale))


def _written_scale(scale: Tensor) -> Tensor:
    written = (scale.bfloat16().float() * STEP).half()
    return torch.where(written == 0, torch.tensor(-(2.0**-24)).half(), written)  # of a group of zeros


def _read_scale(scale: Tensor) -> Tensor:
    return (scale.float() / STEP).bfloat16().float()


def fitted(weight: Weight, mark: Any) -> Weight:
    """A matrix of symmetric 4-bit integers as the values that config.json says they stand for; mark: what it
    has under MARK. Raises CheckpointError for values of another version."""
    found = {name: mark[name] for name in VALUES if name in mark} if isinstance(mark, Mapping) else {}
    if not found or weight.format != "int4" or weight.zero_point is not None:
        return weight
    if found != VALUES:
        raise CheckpointError(f"config.json: {MARK}: got {str(found)[:200]}; expected {VALUES}")
    assert weight.scale is not None
    return replace(weight, format="nl4", data=~weight.data, scale=_read_scale(weight.scale))


VERSION = "0.20.0"
EXPERTS = ".experts."  # part of every routed expert's module name
EXPERTS_TARGET = r"re:.*\.experts\.\d+\..*"


def _pack_rows(zero: Tensor) -> Tensor:
    """int8 [N, G] -> int32 [ceil(N/8), G]."""
    u = torch.nn.functional.pad((zero.t() + 8).to(torch.uint8), (0, -zero.shape[0] % 8))
    return _words(u[:, 0::2] | (u[:, 1::2] << 4)).t().contiguous()


def _words(data: Tensor) -> Tensor:
    """uint8 [R, 4 W] -> int32 [R, W]. Flat in between: a row stride of 1 cannot be viewed as words."""
    return data.flatten().view(torch.int32).view(data.shape[0], -1)


def encode(module: str, weight: Weight, packed: bool = False) -> dict[str, Tensor]:
    """The tensors of one module, by full name; packed: see the module's docstring.

    Raises ValueError for a scale that is zero or not finite, and for a negative one outside INT4, where the
    sign selects the end of the range that reaches further (AutoRound writes such scales too).

    INT8 routed experts have two forms. llm-compressor writes plain int8 matrices (`int-quantized`), which
    vLLM serves as W8A8. transformers 5.24 fuses the experts and decompresses packed ones only, so `packed`
    writes them as 8-bit `pack-quantized`. Everything else has one form.
    """
    if weight.format == "dense":
        return {f"{module}.weight": weight.data}
    assert weight.scale is not None
    scale, data = weight.scale, weight.data
    size = scale.abs() if weight.grouped else scale
    if not bool(((size > 0) & size.isfinite()).all()):
        raise ValueError(f"{module}: a scale is zero, negative or not finite; expected finite scales > 0")
    if weight.format == "nl4":
        scale, data = _written_scale(scale), ~data
    elif weight.format in ("int4", "q5_0") and torch.equal((half := scale.half()).float(), scale):
        scale = half
    out = {f"{module}.weight_scale": scale}
    if weight.format == "fp8" or (weight.format == "int8" and not packed):
        return out | {f"{module}.weight": data}
    n, k = weight.shape
    if weight.format == "int8":
        data = (data.to(torch.int16) + 128).to(torch.uint8)
    if weight.format == "q5_0":
        data = pack_stream(data + 16, 5)
    out[f"{module}.weight_packed"] = _words(torch.nn.functional.pad(data, (0, -data.shape[1] % 4)))
    out[f"{module}.weight_shape"] = torch.tensor([n, k], dtype=torch.int64)
    if weight.zero_point is not None:
        out[f"{module}.weight_zero_point"] = _pack_rows(weight.zero_point)
    return out


@dataclass(frozen=True, slots=True)
class GroupKey:
    """The properties that define a config group when writing."""

    format: str  # int8 | q5_0 | int4 | nl4 | fp8
    group_size: int = 0
    symmetric: bool = True
    # token (dynamic) | tensor (static) | None (kept); int4 also group4: 4 bits, the weights' groups
    activations: str | None = None
    packed: bool = False  # int8 in 32-bit words


def key_of(weight: Weight, activations: str | None = None) -> GroupKey | None:
    """The config group a weight belongs to; None for a dense one."""
    if weight.format == "dense":
        return None
    if weight.grouped:
        return GroupKey(weight.format, weight.group_size, weight.zero_point is None, activations)
    return GroupKey(weight.format, activations=activations if weight.format == "int8" else None)


def quantization_config(modules: Mapping[str, GroupKey | None]) -> dict[str, Any] | None:
    """`quantization_config` for modules (all Linear modules of the model; None = kept dense).

    Routed experts of one group are targeted by one pattern, so that readers that fuse them find their scheme.
    If one other group remains, its target is the class Linear; if several remain, each lists its modules.
    """
    keys = sorted({k for k in modules.values() if k}, key=str)
    if not keys:
        return None
    experts = {k for name, k in modules.items() if EXPERTS in name}
    alike = experts.pop() if len(experts) == 1 else None
    rest = {k for name, k in modules.items() if k and (alike is None or EXPERTS not in name)}
    groups = {}
    for i, key in enumerate(keys):
        targets: Sequence[str] = ["Linear"]
        if len(rest) > 1 or key not in rest:
            own = (name for name, k in modules.items() if k == key)
            targets = sorted(name for name in own if alike is None or EXPERTS not in name)
        if key == alike and len(keys) > 1:
            targets = [EXPERTS_TARGET, *targets]
        groups[f"group_{i}"] = _group(key, targets)
    formats = {g["format"] for g in groups.values()}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted(name for name, k in modules.items() if k is None),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _group(key: GroupKey, targets: Iterable[str]) -> dict[str, Any]:
    if key.format == "fp8":
        storage = "float-quantized"
        weights = _args(8, "float", "block", block_structure=[128, 128])
        inputs: dict[str, Any] | None = _args(8, "float", "group", group_size=128, dynamic=True)
    else:
        inputs = None
        if key.activations == "group4":
            inputs = _args(4, "int", "group", group_size=key.group_size, dynamic=True)
        elif key.activations:
            inputs = _args(8, "int", key.activations, dynamic=key.activations == "token")
        if key.format == "int8":
            storage = "pack-quantized" if key.packed else "int-quantized"
            weights = _args(8, "int", "channel")
        else:
            storage = "pack-quantized"
            bits = INTEGERS[key.format].bits
            weights = _args(bits, "int", "group", group_size=key.group_size, symmetric=key.symmetric)
    return {
        "format": storage,
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _args(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    defaults = {
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
    }
    return {"num_bits": bits, "type": kind, "strategy": strategy} | defaults | more
