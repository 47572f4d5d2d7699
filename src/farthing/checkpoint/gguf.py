"""GGUF files as the shards of a checkpoint: tensor names, stored forms, and values.

A file is described once, by `describe`, under Hugging Face's names; the description is stored as INDEX in
a model directory (see `farthing.model.gguf`), and `GgufShards` reads tensors by it. Matrices keep the
integers and scales of their blocks (see `farthing.checkpoint.gguf_types`).

Legend: N rows, K columns, d head size.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.gguf_types import BLOCKS, FORMATS, HELD_AS, PLAIN, bits_held
from farthing.checkpoint.shards import CheckpointError, Shards, read_json
from farthing.lazy import gguf, np, torch
from farthing.memory import gigabytes
from farthing.ops import Format, Weight, all_finite, dtype_name, numpy_dtype
from farthing.ops.arrays import cast, contiguous, like

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger(__name__)

INDEX = "gguf.json"


@dataclass(frozen=True, slots=True)
class Names:
    """The tensors of an architecture: GGUF's name without `.weight` or `.bias` -> Hugging Face's module.

    layer: of tensors blk.N.*, whole names where the suffix changes too; experts: of stacks [E, N, K], with {}
    for the expert, several where their rows follow each other. turned: matrices whose rows are stored for
    rotation of neighbours, and the metadata field with their number of heads. around_zero: whether norms have
    weights around 0, GGUF's being around 1. tiled: whether the heads of a recurrence are in the order of
    `ValueHeads`. fused: of tensors that hold several modules, key head by key head, the parts of each (see
    `ValueHeads.widths`). types: the model types whose checkpoints are written so.
    """

    layer: Mapping[str, str]
    experts: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    turned: Mapping[str, str] = field(default_factory=dict)
    around_zero: bool = False
    tiled: bool = False
    fused: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    types: tuple[str, ...] = ()

    def stored(self, name: str) -> str:
        """GGUF's name of a tensor; that of an expert's is the stack. Raises KeyError for names it lacks."""
        if (found := _IN_LAYER.fullmatch(name)) is None:
            module, _, suffix = name.rpartition(".")
            return f"{ {v: k for k, v in _OUTER.items()}[module] }.{suffix}"
        layer, inner = found.groups()
        whole = {module: part for part, module in ({**self.experts, **self.layer}).items()}
        if inner in whole:
            return f"blk.{layer}.{whole[inner]}"
        module, _, suffix = _EXPERT.sub(".{}.", inner).rpartition(".")
        return f"blk.{layer}.{whole[module]}.{suffix}"


_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"\.\d+\.")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GATED = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    **_GATED,
}
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.kv_b_proj",  # [H, c, n]: one matrix in two tensors
    "attn_v_b": "self_attn.kv_b_proj",  # [H, v, c]
}
_GATE = {"ffn_gate_inp": "mlp.gate"}
_V3 = {
    **_GATE,
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}
_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
_MIXTRAL = {
    f"ffn_{part}_exps": f"block_sparse_moe.experts.{{}}.{name}"
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
_SPARSE = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
}
_GATES = {"ssm_beta": "linear_attn.in_proj_b", "ssm_alpha": "linear_attn.in_proj_a"}
_DELTA = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_FUSED: dict[str, dict[str, tuple[int, ...]]] = {
    "ssm_in": {_DELTA["attn_qkv"]: (0, 1, 2), _DELTA["attn_gate"]: (3,)},
    "ssm_ba": {_GATES["ssm_beta"]: (0,), _GATES["ssm_alpha"]: (1,)},
}
FUSED_INTO = {"linear_attn.in_proj_qkvz": "ssm_in", "linear_attn.in_proj_ba": "ssm_ba"}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
_POST = {"post_attention_norm": _LAYER["ffn_norm"]}
_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA4 = {
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "layer_output_scale.weight": "layer_scalar",
}
_BESIDE = {f"ffn_{part}_exps": f"experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
_TURNED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
ARCHITECTURES = {
    "llama": Names(
        {**_LAYER, **_SPARSE},
        _MIXTRAL,
        _TURNED,
        types=("llama", "mistral", "mixtral"),
    ),
    "qwen2": Names(_LAYER, types=("qwen2",)),
    "qwen2moe": Names({**_LAYER, **_GATE, **_SHARED}, _EXPERTS, types=("qwen2_moe",)),
    "qwen3": Names(_LAYER, types=("qwen3",)),
    "smollm3": Names(_LAYER, turned=_TURNED, types=("smollm3",)),
    "granite": Names(_LAYER, turned=_TURNED, types=("granite",)),
    "granitemoe": Names(
        {**_LAYER, "ffn_gate_inp": "block_sparse_moe.router.layer"},
        {part: f"block_sparse_moe.{module.removeprefix('mlp.')}" for part, module in _EXPERTS.items()},
        _TURNED,
        types=("granitemoe",),
    ),
    "olmoe": Names({**_LAYER, **_GATE}, _EXPERTS, types=("olmoe",)),
    "seed_oss": Names({**_LAYER, **_POST}, types=("seed_oss",)),
    "dots1": Names({**_LAYER, **_V3}, _EXPERTS, types=("dots1",)),
    "qwen3moe": Names({**_LAYER, **_GATE}, _EXPERTS, types=("qwen3_moe",)),
    "deepseek2": Names(
        {**_LAYER, **_LATENT, **_V3}, _EXPERTS, types=("deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25")
    ),
    "glm4moe": Names({**_LAYER, **_V3, **_POST}, _EXPERTS, types=("glm4_moe",)),
    "minimax-m2": Names({**_LAYER, **_SPARSE}, _MIXTRAL, types=("minimax_m2",)),
    "qwen35moe": Names(
        {**_LAYER, **_GATE, **_DELTA, **_GATES, **_SHARED, **_POST},
        _EXPERTS,
        around_zero=True,
        tiled=True,
        types=("qwen3_5_moe", "qwen3_5_moe_text"),
    ),
    "qwen35": Names(
        {**_LAYER, **_DELTA, **_GATES, **_POST},
        around_zero=True,
        tiled=True,
        types=("qwen3_5", "qwen3_5_text"),
    ),
    "qwen3next": Names(
        {**_LAYER, **_GATE, **_DELTA, **_SHARED, **_POST},
        _EXPERTS,
        around_zero=True,
        fused=_FUSED,
        types=("qwen3_next",),
    ),
    "gpt-oss": Names(
        {**_LAYER, **_POST, "attn_sinks.weight": "self_attn.sinks", "ffn_gate_inp": "mlp.router"},
        _EXPERTS,
        types=("gpt_oss",),
    ),
    "gemma3": Names({**_LAYER, **_NORMS}, around_zero=True),
    "gemma4": Names(
        {**_LAYER, **_NORMS, **_GEMMA4},
        {**_BESIDE, "ffn_gate_up_exps": (_BESIDE["ffn_gate_exps"], _BESIDE["ffn_up_exps"])},
    ),
}
COMPUTED = ("rope_freqs.weight",)  # tensors whose values follow from the configuration
_JOINED = ("attn_k_b", "attn_v_b")


@dataclass(frozen=True, slots=True)
class ValueHeads:
    """The heads of a recurrence: GGUF has the first value head of every key head first, then the second."""

    keys: int
    per: int  # value heads of a key head
    key_dim: int
    value_dim: int

    def order(self, part: str) -> tuple[int, int, list[int]] | None:
        """Of a tensor: (axis, rows before the values, [per, keys, width of a head]); None: as it is."""
        width = 1 if part in (*_GATES, "ssm_dt", "ssm_a") else self.value_dim
        before = 2 * self.keys * self.key_dim if part in ("attn_qkv", "ssm_conv1d") else 0
        if part not in (*(p.partition(".")[0] for p in _DELTA), *_GATES) or part == "ssm_norm":
            return None
        return int(part == "ssm_out"), before, [self.per, self.keys, width]

    def widths(self, part: str) -> list[int]:
        """Rows of each part that a fused tensor has of every key head."""
        values = self.per * self.value_dim
        return [self.key_dim, self.key_dim, values, values] if part == "ssm_in" else [self.per, self.per]


def changes_of(
    names: Names, part: str, heads: Callable[[str], int], values: ValueHeads | None
) -> dict[str, Any]:
    """How a tensor of GGUF differs from Hugging Face's, as fields of its entry."""
    changes: dict[str, Any] = {}
    if part in names.turned:
        changes["heads"] = heads(names.turned[part])
    if names.tiled and values is not None and (order := values.order(part)):
        changes["order"] = order
    if names.around_zero and part.endswith("norm") and part != "ssm_norm":
        changes["then"] = "minus 1"
    if part == "ssm_a":
        changes["then"] = "log"
    return changes


def _stored(tensor: Any, file: Path, part: str) -> dict[str, Any]:
    """Where a tensor is, and its type and shape. Raises CheckpointError for a type that is not read."""
    kind = tensor.tensor_type.name
    if kind not in PLAIN and kind not in FORMATS:
        raise CheckpointError(
            f"{file}: {tensor.name[:200]}: found type {kind}; expected one of "
            f"{', '.join((*PLAIN, *FORMATS))} (llama-quantize --allow-requantize converts it to Q8_0)"
        )
    shape = [int(n) for n in reversed(tensor.shape.tolist())]
    if part == "ssm_conv1d" and len(shape) == 2:
        shape.insert(1, 1)
    if part == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape.insert(0, 1)
    return {"file": str(file), "type": kind, "shape": shape, "offset": int(tensor.data_offset)}


def describe(
    tensors: Sequence[Any],
    file: Path,
    architecture: str,
    heads: Callable[[str], int],
    layers: int,
    values: ValueHeads | None = None,
    blocks: int | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Hugging Face's name, where and how it is stored) of every tensor of a file that `gguf` has opened.

    heads: a count of heads by metadata field; layers: how many are read, MTP layers follow them up to
    `blocks`. Raises CheckpointError for names and types that are not read.
    """
    names = ARCHITECTURES[architecture]
    for tensor in tensors:
        if tensor.name in COMPUTED:
            continue
        block, layer, rest = [*tensor.name.split(".", 2), "", ""][:3]
        if block != "blk":
            layer, rest = "", tensor.name
        stem, _, suffix = rest.rpartition(".")
        part = stem or suffix
        if layer.isdecimal() and layers <= int(layer) < (blocks or layers):
            continue
        fused = names.fused.get(stem) if layer else None
        module = _OUTER.get(stem) if not layer else names.layer.get(stem) or names.experts.get(stem)
        whole = names.layer.get(rest) if layer else None
        plain = (module or fused) is not None and suffix in ("weight", "bias")
        inside = not layer or (layer.isdecimal() and int(layer) < layers)
        if not (whole or plain) or not inside:
            raise CheckpointError(
                f"{file}: {tensor.name[:200]}: expected the tensors of architecture {architecture!r}"
            )
        entry = _stored(tensor, file, part) | changes_of(names, part, heads, values)
        shape = [int(n) for n in reversed(tensor.shape.tolist())]
        prefix = f"model.layers.{layer}." if layer else ""
        if fused is not None and values is not None:
            for name, parts in fused.items():
                widths = values.widths(part)
                rows = values.keys * sum(widths[i] for i in parts)
                yield f"{prefix}{name}.{suffix}", {
                    **entry, "shape": [rows, *shape[1:]], "whole": shape,
                    "parts_of": [values.keys, widths, parts],
                }  # fmt: skip
            continue
        stored = prefix + (whole or f"{module}.{suffix}")
        if part in _JOINED:
            stored = f"{stored}/{part}"
        if whole or part not in names.experts:
            yield stored, entry
            continue
        stacked = names.experts[part]
        modules = (stacked,) if isinstance(stacked, str) else stacked
        size, width = int(tensor.n_bytes) // shape[0] // len(modules), shape[1] // len(modules)
        for i, (expert, each) in enumerate(product(range(shape[0]), modules)):
            yield f"{prefix}{each.format(expert)}.{suffix}", {
                **entry, "shape": [width, *shape[2:]], "offset": entry["offset"] + i * size,
            }  # fmt: skip


class GgufShards(Shards):
    """The tensors of GGUF files by Hugging Face's names, as a model directory's INDEX lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays = False
        self._index: dict[str, dict[str, Any]] = read_json(path / INDEX)
        for name in [name for name in self._index if "/" in name]:
            whole, _, part = name.partition("/")
            entry = self._index.pop(name)
            joined = self._index.setdefault(whole, {"file": entry["file"], "type": "F32", "parts": {}})
            joined["parts"][part] = entry
        for name, entry in self._index.items():
            if "parts" in entry:
                entry["shape"] = _joined_shape(f"{path}: {name}", entry["parts"])
        self._maps: dict[str, NDArray[Any]] = {}
        self._said = False
        self.reading = lambda name: None
        self.file_of = {name: entry["file"] for name, entry in self._index.items()}

    def read(self, name: str) -> Tensor:
        """The tensor; that of blocks as bfloat16."""
        self.reading(name)
        array = self.array(name)
        if dtype_name(array.dtype) == "bfloat16":
            return torch.from_numpy(array.view("<i2")).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a numpy array."""
        entry = self._index[name]
        if "parts" in entry:
            return self.exact(name)
        if entry["type"] in PLAIN:
            plain: NDArray[Any] = self._raw(name, entry).view(numpy_dtype(PLAIN[entry["type"]]))
            plain = plain.reshape(entry["shape"])
            if entry.get("order", (0,))[0]:
                plain = plain[:, _columns_of(entry)]
            if "then" in entry:
                plain = plain - 1 if entry["then"] == "minus 1" else np.log(-plain)
            return plain
        log.warning("%s is decoded to bfloat16", self._where(name, entry))
        return _to_bfloat16(self._where(name, entry), self.exact(name))

    def stored(self, name: str) -> tuple[Format, int] | None:
        return FORMATS.get(self._index[name]["type"]) if name in self._index else None

    def weight(self, name: str) -> Weight | None:
        entry = self._index.get(name)
        if entry is None or entry["type"] in PLAIN:
            return None
        self.reading(name)
        if entry["type"] in HELD_AS:
            self._say_held()
        rows = self._raw(name, entry)
        weight = BLOCKS[entry["type"]](rows.reshape(len(rows), -1, _block(entry)[1]))
        if entry.get("order", (0,))[0]:
            weight = columns_in_order(weight, _columns_of(entry))
        if not all(all_finite(t) for t in (weight.scale, weight.minimum) if t is not None):
            raise CheckpointError(
                f"{self._where(name, entry)}: expected finite scales, found NaN or infinity"
            )
        return weight if self.arrays else weight.on_torch()

    def _say_held(self) -> None:
        """Log once what the kernels hold in the form of another type, and what that takes."""
        if self._said:
            return
        self._said = True
        entries = [entry for entry in self._index.values() if entry["type"] in HELD_AS]
        types = sorted({entry["type"] for entry in entries})
        held = sum(prod(entry["shape"]) * bits_held(entry["type"]) / 8 for entry in entries)
        log.info(
            "%s: %s matrices are held as %s in groups of 16, of the same values: %s instead of %s",
            self.path, " and ".join(types), " and ".join(HELD_AS[kind] for kind in types),
            gigabytes(int(held)), gigabytes(sum(map(_size, entries))),
        )  # fmt: skip

    def exact(self, name: str) -> NDArray[np.float32]:
        """The values of a tensor as the library `gguf` decodes them."""
        entry = self._index[name]
        if "parts" in entry:
            key, value = (self._decoded(name, entry["parts"][part]) for part in _JOINED)
            joined: NDArray[np.float32] = np.concatenate((key.swapaxes(1, 2), value), 1)
            return joined.reshape(entry["shape"])
        return self._decoded(name, entry)

    def _decoded(self, name: str, entry: Mapping[str, Any]) -> NDArray[np.float32]:
        kind = gguf.GGMLQuantizationType[entry["type"]]
        values: NDArray[np.float32] = gguf.quants.dequantize(self._raw(name, entry), kind)
        return values.reshape(entry["shape"])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, from the index only."""
        return tuple(self._index[name]["shape"])

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        return sum(map(_size, self._index[name].get("parts", {"": self._index[name]}).values()))

    def dtype(self, name: str) -> str:
        """The dtype of what `read` returns, as safetensors names it."""
        kind = self._index[name]["type"]
        return kind if kind in PLAIN else "BF16"

    def release(self) -> None:
        """Unmap every file; tensors already returned stay valid."""
        self._maps.clear()

    def _raw(self, name: str, entry: Mapping[str, Any]) -> NDArray[np.uint8]:
        """The bytes of a tensor, one row per row of a matrix in Hugging Face's order."""
        file = entry["file"]
        if file not in self._maps:
            try:
                # Copied on writing: torch warns of arrays that cannot be written.
                self._maps[file] = np.memmap(file, np.uint8, "c")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: cannot be mapped: {error}") from error
        whole = entry.get("whole", entry["shape"])
        size, start = _size({**entry, "shape": whole}), entry["offset"]
        data = self._maps[file][start : start + size]
        if len(data) < size:
            raise CheckpointError(
                f"{self._where(name, entry)}: expected {size} bytes, found {len(data)}: a truncated file"
            )
        order = rows_in_order(entry, whole[0])
        if order is None:
            return data.reshape(prod(whole[:-1]), -1)
        return data.reshape(whole[0], -1)[order]

    def _where(self, name: str, entry: Mapping[str, Any]) -> str:
        return f"{entry['file']}: {name} ({entry['type']})"


def rows_in_order(entry: Mapping[str, Any], rows: int) -> NDArray[np.int64] | None:
    """Where the rows of Hugging Face's tensor are in GGUF's; None: in the same places."""
    where = f"{entry.get('file')}: found {rows} rows"
    if "parts_of" in entry:
        keys, widths, parts = entry["parts_of"]
        if rows != keys * sum(widths):
            raise CheckpointError(f"{where}; expected {widths} of each of {keys} key heads")
        by_head, ends = np.arange(rows).reshape(keys, -1), np.cumsum([0, *widths])
        return np.concatenate([by_head[:, ends[i] : ends[i + 1]].reshape(-1) for i in parts])
    if heads := entry.get("heads"):
        if rows % (2 * heads):
            raise CheckpointError(f"{where}; expected pairs of {heads} heads")
        # llama.cpp rotates neighbouring rows of a head, Hugging Face the first half with the second.
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if "order" in entry and entry["order"][0] == 0:
        return values_in_order(entry["order"], rows, str(entry.get("file")))
    return None


def values_in_order(order: Sequence[Any], size: int, where: str = "") -> NDArray[np.int64]:
    """Where rows or columns of value heads are in GGUF, by key head; order: as `ValueHeads.order` says."""
    _, before, (per, keys, width) = order
    if before + per * keys * width != size:
        raise CheckpointError(f"{where}: found {size} rows or columns; expected {keys * per} value heads")
    tiled = np.arange(per * keys * width).reshape(per, keys, width).swapaxes(0, 1).reshape(-1)
    return np.concatenate((np.arange(before), before + tiled))


def _columns_of(entry: Mapping[str, Any]) -> NDArray[np.int64]:
    return values_in_order(entry["order"], entry["shape"][1], entry["file"])


def columns_in_order(weight: Weight, order: NDArray[np.int64]) -> Weight:
    """Columns reordered; where they share units or groups are wider, they stay and their order is stated."""
    if weight.format == "fp8":
        weight = Weight("dense", weight.dequantize())
    if weight.format in ("dense", "int8"):
        return replace(weight, data=weight.data[:, like(order, weight.data)])
    size = weight.group_size
    groups = order.reshape(-1, size) if len(order) % size == 0 else order[None]
    moved = np.array_equal(groups, groups[:, :1] + np.arange(groups.shape[1])) and bool(
        (groups[:, 0] % size == 0).all()
    )
    if weight.units is not None or not moved:
        return replace(weight, order=like(order.argsort(), weight.data))
    at = like(groups[:, 0] // size, weight.data)
    n, packed = len(weight.data), size // 2 if weight.nibbles else size
    data = contiguous(weight.data.reshape(n, -1, packed)[:, at].reshape(n, -1))
    scale, minimum, zero_point = (
        None if t is None else t[:, at] for t in (weight.scale, weight.minimum, weight.zero_point)
    )
    return replace(weight, data=data, scale=scale, minimum=minimum, zero_point=zero_point)


def _joined_shape(where: str, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """[H (n + v), c] of keys [H, c, n] and values [H, v, c]."""
    shapes = [parts[part]["shape"] if part in parts else [] for part in _JOINED]
    if [len(s) for s in shapes] != [3, 3] or shapes[0][:2] != [shapes[1][0], shapes[1][2]]:
        raise CheckpointError(f"{where}: found {shapes}; expected {' and '.join(_JOINED)} of the same heads")
    (h, c, n), v = shapes[0], shapes[1][1]
    return [h * (n + v), c]


def _block(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Columns and bytes of a block."""
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry["type"]]]
    return int(columns), int(size)


def _size(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor in its file."""
    columns, size = _block(entry)
    return int(prod(entry["shape"])) // columns * size


def _to_bfloat16(where: str, values: NDArray[np.float32]) -> NDArray[Any]:
    """Rounded to the nearest, half to even."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{where}: expected finite values, found NaN or infinity")
    return cast(values, "bfloat16")  # type: ignore[arg-type, return-value]
