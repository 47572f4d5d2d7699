"""GGUF files as the shards of a checkpoint: tensor names, stored forms, and values.

A file is described once, by `describe`, under Hugging Face's names; the description is stored as INDEX in
a model directory (see `farthing.model.gguf`), and `GgufShards` reads tensors by it. Q4_0 matrices appear
as packed 4-bit groups of compressed-tensors, which have the same values. All other block types are decoded.

Legend: N rows, K columns, d head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.shards import CheckpointError, Shards, read_json
from farthing.lazy import gguf, np, torch
from farthing.ops.arrays import dtype_name, numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger(__name__)

INDEX = "gguf.json"
GROUP = 32  # columns that share a scale in Q4_0
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DECODED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "MXFP4",
)  # fmt: skip
_PARTS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True, slots=True)
class Names:
    """The tensors of an architecture: GGUF's name without suffix -> Hugging Face's module.

    layer: of tensors blk.N.*; experts: of stacks [E, N, K], with {} for the expert. turned: matrices whose
    rows are stored for rotation of neighbours, and the metadata field with their number of heads.
    """

    layer: Mapping[str, str]
    experts: Mapping[str, str]
    turned: Mapping[str, str]


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
ARCHITECTURES = {
    "llama": Names(_LAYER, {}, {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}),
    "qwen3": Names(_LAYER, {}, {}),
    "qwen3moe": Names({**_LAYER, "ffn_gate_inp": "mlp.gate"}, _EXPERTS, {}),
}
COMPUTED = ("rope_freqs.weight",)  # tensors whose values follow from the configuration


def describe(
    tensors: Sequence[Any], file: Path, architecture: str, heads: Callable[[str], int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Hugging Face's name, where and how it is stored) of every tensor of a file that `gguf` has opened.

    heads: a count of heads by metadata field. Raises CheckpointError for names and types that are not read.
    """
    names = ARCHITECTURES[architecture]
    for tensor in tensors:
        if tensor.name in COMPUTED:
            continue
        stem, _, suffix = tensor.name.rpartition(".")
        layer, _, part = stem.removeprefix("blk.").partition(".") if stem.startswith("blk.") else ("", "", "")
        module = _OUTER.get(stem) if not layer else names.layer.get(part) or names.experts.get(part)
        if module is None or suffix not in ("weight", "bias") or (layer and not layer.isdecimal()):
            raise CheckpointError(
                f"{file}: {tensor.name[:200]}: expected the tensors of architecture {architecture!r}"
            )
        kind = tensor.tensor_type.name
        if kind not in _PLAIN and kind not in _DECODED:
            raise CheckpointError(
                f"{file}: {tensor.name[:200]}: found type {kind}; expected one of "
                f"{', '.join((*_PLAIN, *_DECODED))} (llama-quantize --allow-requantize converts it to Q8_0)"
            )
        shape = [int(n) for n in reversed(tensor.shape.tolist())]
        entry = {"file": str(file), "type": kind, "shape": shape, "offset": int(tensor.data_offset)}
        if part in names.turned:
            entry["heads"] = heads(names.turned[part])
        stored = f"model.layers.{layer}.{module}.{suffix}" if layer else f"{module}.{suffix}"
        if part not in names.experts:
            yield stored, entry
            continue
        size = int(tensor.n_bytes) // shape[0]
        for expert in range(shape[0]):
            yield stored.format(expert), {
                **entry, "shape": shape[1:], "offset": entry["offset"] + expert * size,
            }  # fmt: skip


def quantization_of(index: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The quantization_config of matrices that keep their 4-bit groups; {} if there are none."""
    if not any(_keeps_groups(name, entry) for name, entry in index.items()):
        return {}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": [],
    }


def _keeps_groups(name: str, entry: Mapping[str, Any]) -> bool:
    return entry["type"] == "Q4_0" and name.endswith(("_proj.weight", "lm_head.weight"))


class GgufShards(Shards):
    """The tensors of GGUF files by Hugging Face's names, as a model directory's INDEX lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index: dict[str, dict[str, Any]] = read_json(path / INDEX)
        self._maps: dict[str, NDArray[Any]] = {}
        self._said = False
        self.reading = lambda name: None
        self.file_of = {}
        for name, entry in self._index.items():
            module = name.removesuffix(".weight")
            kept = _keeps_groups(name, entry)
            names = [f"{module}.{part}" for part in _PARTS] if kept else [name]
            self.file_of.update(dict.fromkeys(names, entry["file"]))

    def read(self, name: str) -> Tensor:
        """The tensor, decoded if its type has no equal here."""
        self.reading(name)
        array = self.array(name)
        if dtype_name(array.dtype) == "bfloat16":
            return torch.from_numpy(array.view("<i2")).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a numpy array."""
        part, entry = name.rpartition(".")[2], self._entry(name)
        if part == "weight_shape":
            return np.array(entry["shape"], np.int64)
        if part in _PARTS:
            blocks = self._raw(name, entry).reshape(entry["shape"][0], -1, 2 + GROUP // 2)
            return _scales(blocks) if part == "weight_scale" else _words(blocks)
        if entry["type"] in _PLAIN:
            plain: NDArray[Any] = self._raw(name, entry).view(numpy_dtype(_PLAIN[entry["type"]]))
            return plain.reshape(entry["shape"])
        self._say()
        return _to_bfloat16(self._where(name, entry), self.exact(name))

    def exact(self, name: str) -> NDArray[np.float32]:
        """The values of a tensor as the library `gguf` decodes them."""
        entry = self._entry(name)
        kind = gguf.GGMLQuantizationType[entry["type"]]
        values: NDArray[np.float32] = gguf.quants.dequantize(self._raw(name, entry), kind)
        return values.reshape(entry["shape"])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, from the index only."""
        rows, *columns = self._entry(name)["shape"]
        part = name.rpartition(".")[2]
        if part == "weight_shape":
            return (2,)
        per = {"weight_packed": 8, "weight_scale": GROUP}.get(part, 1)
        return (rows, *(n // per for n in columns))

    def nbytes(self, name: str) -> int:
        """Bytes in the file; all of a matrix in 4-bit groups count as its integers'."""
        if name.endswith(_PARTS[1:]):
            return 0
        entry = self._entry(name)
        return _size(entry)

    def dtype(self, name: str) -> str:
        """The dtype of what `read` returns, as safetensors names it."""
        part = name.rpartition(".")[2]
        kinds = {"weight_packed": "I32", "weight_scale": "F16", "weight_shape": "I64"}
        kind = self._entry(name)["type"]
        return kinds.get(part) or (kind if kind in _PLAIN else "BF16")

    def release(self) -> None:
        """Unmap every file; tensors already returned stay valid."""
        self._maps.clear()

    def _entry(self, name: str) -> dict[str, Any]:
        module, _, part = name.rpartition(".")
        return self._index[f"{module}.weight" if part in _PARTS else name]

    def _raw(self, name: str, entry: Mapping[str, Any]) -> NDArray[np.uint8]:
        """The bytes of a tensor, one row per row of a matrix in Hugging Face's order."""
        file = entry["file"]
        if file not in self._maps:
            try:
                # Copied on writing: torch warns of arrays that cannot be written.
                self._maps[file] = np.memmap(file, np.uint8, "c")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: cannot be mapped: {error}") from error
        size, start = _size(entry), entry["offset"]
        data = self._maps[file][start : start + size]
        if len(data) < size:
            raise CheckpointError(
                f"{self._where(name, entry)}: expected {size} bytes, found {len(data)}: a truncated file"
            )
        rows = data.reshape(prod(entry["shape"][:-1]), -1)
        heads = entry.get("heads")
        if not heads:
            return rows
        # llama.cpp rotates neighbouring rows of a head, Hugging Face the first half with the second.
        flat = rows if len(entry["shape"]) > 1 else data.reshape(entry["shape"][0], -1)
        if len(flat) % (2 * heads):
            raise CheckpointError(
                f"{self._where(name, entry)}: found {len(flat)} rows; expected pairs of {heads} heads"
            )
        order = np.arange(len(flat)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return flat[order]

    def _say(self) -> None:
        """Log once which bytes are not kept."""
        if self._said:
            return
        self._said = True
        kept = {name for name, entry in self._index.items() if _keeps_groups(name, entry)}
        decoded = [e for n, e in self._index.items() if e["type"] not in _PLAIN and n not in kept]
        log.warning(
            "%s: %d tensors in %s are decoded to bfloat16: %.2f GB in the file become %.2f GB; "
            "--quantization int8 or int4 rounds their matrices again while loading",
            next(iter(decoded))["file"], len(decoded), ", ".join(sorted({e["type"] for e in decoded})),
            sum(map(_size, decoded)) / 1e9, sum(2 * prod(e["shape"]) for e in decoded) / 1e9,
        )  # fmt: skip

    def _where(self, name: str, entry: Mapping[str, Any]) -> str:
        return f"{entry['file']}: {name} ({entry['type']})"


def _size(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor in its file."""
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry["type"]]]
    return int(prod(entry["shape"]) // columns * size)


def _scales(blocks: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Q4_0 blocks [N, K / 32, 18] -> their scales [N, K / 32]."""
    scales: NDArray[np.float16] = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    return scales


def _words(blocks: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Q4_0 blocks -> their integers in order, eight in a word [N, K / 8]: a byte of a block holds columns j
    and j + 16."""
    codes = np.concatenate((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), axis=-1)
    pairs = codes[..., 0::2] | (codes[..., 1::2] << 4)
    words: NDArray[np.int32] = np.ascontiguousarray(pairs).view("<i4").reshape(len(blocks), -1)
    return words


def _to_bfloat16(where: str, values: NDArray[np.float32]) -> NDArray[Any]:
    """Rounded to the nearest, half to even."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{where}: expected finite values, found NaN or infinity")
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype("<u2").view(numpy_dtype("bfloat16"))
