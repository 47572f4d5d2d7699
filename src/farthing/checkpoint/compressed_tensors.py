"""The compressed-tensors format (0.20) in both directions, and FP8 in blocks, which several formats share.

Legend: N rows, K columns, g group size. Element i of a packed row sits at bit 4 i of its little-endian
words, as u = q + 8; zero points are packed the same way along dimension 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.shards import CheckpointError
from farthing.lazy import torch
from farthing.ops.weights import CODES, FP8_BLOCK, Weight, pack_int4

if TYPE_CHECKING:
    from torch import Tensor


BLOCK = 128
E4M3_MAX = 448.0
# Suffixes of a module's factor: DeepSeek's and transformers', compressed-tensors', Mistral's.
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
# Calibrated factors of activations, which the kernels do not round to FP8.
ACTIVATION_SCALES = ("*input_scale", "*activation_scale", "*.qscale_act")
# Calibrated ranges of queries, keys and values (kv_cache_scheme); the latent cache has ranges of its own.
CACHE_SCALES = ("*.self_attn.[qkv]_scale", "*.self_attn.[qkv]_zero_point")


def block_scales(name: str, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """A stored factor as [ceil(N/128), ceil(K/128)] float32. Raises CheckpointError for other shapes.

    FP8 weights: E4M3 with one float32 factor per 128 x 128 block (DeepSeek-V3 sec. 3.3.2) or per matrix.

    The factor is stored under one of the names in SCALES and multiplies, whatever its name: W = W8 * scale of
    its block. One factor for a whole matrix is the same as equal factors for all of its blocks. Shapes: W [N,
    K]; scale_inv [ceil(N/block), ceil(K/block)]; the last block of a row or column may be ragged.
    """
    blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(blocks).contiguous()
    if tuple(scale.shape) != blocks:
        raise CheckpointError(
            f"{name}: expected one number or shape {list(blocks)} (blocks of {BLOCK}), "
            f"found {list(scale.shape)}"
        )
    return scale.float()


def quantize_blocks(w: Tensor, block: int = BLOCK, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """W [N, K] floating -> (float8_e4m3fn [N, K], float32 scale_inv [ceil(N/block), ceil(K/block)]).

    `ue8m0` rounds each scale up to a power of two, as DeepSeek-V3.1 stores them. A zero block gets scale 1.
    """
    _check_matrix("w", w)
    if not w.is_floating_point():
        raise ValueError(f"w has dtype {w.dtype}; expected a floating-point matrix")
    if not torch.isfinite(w).all():
        raise ValueError("w has inf or nan; expected finite weights")
    tiles = _tiles(w.float(), block)  # [rows, block, cols, block]
    amax = tiles.abs().amax(dim=(1, 3))
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scaled = (tiles / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return _untile(scaled, w.shape).to(torch.float8_e4m3fn), scale


def dequantize_blocks(
    w8: Tensor, scale_inv: Tensor, block: int = BLOCK, dtype: torch.dtype | None = None
) -> Tensor:
    """The inverse: (w8 [N, K] E4M3, scale_inv float32) -> W [N, K] in `dtype` (float32), multiplied in
    float32."""
    dtype = dtype or torch.float32
    _check_matrix("w8", w8)
    expected = (-(-w8.shape[0] // block), -(-w8.shape[1] // block))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv has shape {tuple(scale_inv.shape)}; expected {expected} for a {tuple(w8.shape)} "
            f"weight in blocks of {block}"
        )
    tiles = _tiles(w8.float(), block) * scale_inv.float()[:, None, :, None]
    return _untile(tiles, w8.shape).to(dtype)


def _check_matrix(name: str, w: Tensor) -> None:
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{name} has shape {tuple(w.shape)}; expected a non-empty matrix [N, K]")


def _tiles(w: Tensor, block: int) -> Tensor:
    """[N, K] -> [rows, block, cols, block], zero-padded to whole blocks."""
    rows, cols = -(-w.shape[0] // block), -(-w.shape[1] // block)
    padded = torch.nn.functional.pad(w, (0, cols * block - w.shape[1], 0, rows * block - w.shape[0]))
    return padded.view(rows, block, cols, block)


def _untile(tiles: Tensor, shape: torch.Size) -> Tensor:
    rows, block, cols, _ = tiles.shape
    return tiles.reshape(rows * block, cols * block)[: shape[0], : shape[1]].contiguous()


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
        ("int-quantized", 8, "int"): ("tensor", "channel", "group"),
        ("int-quantized", 4, "int"): ("tensor", "channel", "group"),
        ("pack-quantized", 4, "int"): ("tensor", "channel", "group"),
        ("pack-quantized", 8, "int"): ("tensor", "channel", "group"),
        ("naive-quantized", 8, "int"): ("tensor", "channel"),
        ("float-quantized", 8, "float"): ("tensor", "block"),
        ("naive-quantized", 8, "float"): ("tensor", "block"),
    }
    if strategy not in supported.get((storage, scheme.bits, kind), ()):
        accepted = ", ".join(sorted(f"{f} {b} bit {k} {'|'.join(s)}" for (f, b, k), s in supported.items()))
        raise CheckpointError(
            f"{where}: unknown quantization {storage} {bits} bit {kind} {strategy} (format, num_bits, type, "
            f"strategy); expected {accepted}"
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
    scheme = {"type": "int", "strategy": "tensor", "symmetric": True, **inputs}
    return bool(inputs) and not inputs.get("dynamic") and all(scheme.get(k) == v for k, v in wanted.items())


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
        if scheme.strategy != "group":
            return Weight("int8", data, _rows(scale, n))
        _check_groups(scheme, scale, n, k, tensors)
        return Weight("int8_groups", data, scale)
    nibbles = data[:, : k // 2] if scheme.storage == "pack-quantized" else pack_int4(data)
    return _int4(scheme, nibbles, _rows(scale, n) if scheme.strategy != "group" else scale, n, k, tensors)


def _int4(
    scheme: Scheme, nibbles: Tensor, scale: Tensor, n: int, k: int, tensors: Mapping[str, Tensor]
) -> Weight:
    _check_groups(scheme, scale, n, k, tensors)
    if scheme.symmetric:
        return Weight("int4", nibbles.contiguous(), scale)
    zero = tensors["weight_zero_point"]
    if zero.dtype == torch.int32:
        expect("weight_zero_point", (-(-n // 8), scale.shape[1]), zero)
        zero = _unpack_rows(zero, n)
    expect("weight_zero_point", tuple(scale.shape), zero)
    return Weight("int4", nibbles.contiguous(), scale, zero.to(torch.int8))


def _check_groups(scheme: Scheme, scale: Tensor, n: int, k: int, tensors: Mapping[str, Tensor]) -> None:
    """Whether scales are of groups of adjacent columns."""
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
    size = scale.abs() if weight.nibbles else scale
    if not bool(((size > 0) & size.isfinite()).all()):
        raise ValueError(f"{module}: a scale is zero, negative or not finite; expected finite scales > 0")
    if weight.format == "nl4":
        scale, data = _written_scale(scale), ~data
    elif weight.format == "int4" and torch.equal((half := scale.half()).float(), scale):
        scale = half
    out = {f"{module}.weight_scale": scale}
    if weight.format == "fp8" or (weight.format == "int8" and not packed):
        return out | {f"{module}.weight": data}
    n, k = weight.shape
    if weight.format == "int8":
        data = (data.to(torch.int16) + 128).to(torch.uint8)
    out[f"{module}.weight_packed"] = _words(torch.nn.functional.pad(data, (0, -data.shape[1] % 4)))
    out[f"{module}.weight_shape"] = torch.tensor([n, k], dtype=torch.int64)
    if weight.zero_point is not None:
        out[f"{module}.weight_zero_point"] = _pack_rows(weight.zero_point)
    return out


@dataclass(frozen=True, slots=True)
class GroupKey:
    """The properties that define a config group when writing."""

    format: str  # int8 | int4 | nl4 | fp8
    group_size: int = 0
    symmetric: bool = True
    # token (dynamic) | tensor (static) | None (kept); int4 also group4: 4 bits, the weights' groups
    activations: str | None = None
    packed: bool = False  # int8 in 32-bit words


def key_of(weight: Weight, activations: str | None = None) -> GroupKey | None:
    """The config group a weight belongs to; None for a dense one."""
    if weight.format == "dense":
        return None
    if weight.nibbles:
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
            weights = _args(4, "int", "group", group_size=key.group_size, symmetric=key.symmetric)
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
