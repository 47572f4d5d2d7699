"""A Hugging Face model directory as named tensors and weights, quantized or not.

Tensors are read on demand. Every error names the file, the tensor, the expected and the found value.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.floats import SCALES, Fp8
from farthing.checkpoint.gguf import INDEX as GGUF_INDEX
from farthing.checkpoint.gguf import GgufShards
from farthing.checkpoint.layout import Layout, Parts, Scheme
from farthing.checkpoint.shards import (
    DTYPES,
    INDEX,
    MISTRAL_INDEX,
    SINGLE,
    CheckpointError,
    ReadAhead,
    Shards,
    read_index,
    read_json,
)
from farthing.checkpoint.toolkits import bitsandbytes, modelopt
from farthing.checkpoint.words import auto_round, awq, gptq
from farthing.ops import Format, Weight, all_finite, as_float32, dtype_name
from farthing.process import Progress

if TYPE_CHECKING:
    from torch import Tensor


# How a config.json or a params.json says that weights are quantized.

_KEYS = ("quantization_config", "compression_config")
_MISTRAL, _WEIGHT = "quantization", "qformat_weight"  # in params.json
MXFP4, MXFP4_GROUP = "mxfp4", 32  # and columns that share a scale


def quantization_in(config: Mapping[str, Any]) -> Any:
    """The quantization that a configuration or its text part declares, unchecked; None if there is none."""
    text = config.get("text_config")  # multimodal models nest the language model's config
    parts = (config, text if isinstance(text, dict) else {})
    section = next((part[key] for part in parts for key in _KEYS if part.get(key)), None)
    if isinstance(section, dict) and "expert_dtype" in config:  # DeepSeek-V4 has it beside the section
        section = {"expert_dtype": config["expert_dtype"], **section}
    return section or config.get(_MISTRAL) or None


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its quantization."""
    return {key: value for key, value in config.items() if key not in (*_KEYS, ct.MARK)}


def stored_as(path: Path) -> str:
    """The format of a model's files: `gguf` or `safetensors`."""
    return "gguf" if (path / GGUF_INDEX).is_file() or path.suffix == ".gguf" else "safetensors"


def is_quantized(path: Path) -> bool:
    """Whether the weights of a model directory are stored in fewer than 16 bits, by its configuration or the
    index of its GGUF file."""
    if (path / GGUF_INDEX).is_file():
        shards = GgufShards(path)
        return any(shards.stored(name) for name in shards.file_of)
    return bool(quantization_in(read_config(path)))


def method_of(quantization: Mapping[str, Any]) -> str:
    """Its quant_method; 'dense' for an empty one."""
    return str(quantization.get("quant_method", "fp8" if _WEIGHT in quantization else "dense"))


def _mistral(quantization: Mapping[str, Any]) -> Layout:
    if quantization[_WEIGHT] != "fp8_e4m3":
        raise CheckpointError(
            f"params.json: {_MISTRAL}.{_WEIGHT}: got {str(quantization[_WEIGHT])[:80]!r}; expected 'fp8_e4m3'"
        )
    return Fp8()


_LAYOUTS: Mapping[str, Callable[[Mapping[str, Any]], Layout | None]] = {
    "fp8": Fp8.from_json,
    "fbgemm_fp8": Fp8.from_json,
    MXFP4: lambda quantization: None,  # tensors have names of their own: `farthing.model.source`
    ct.METHOD: ct.Groups.from_json,
    "gptq": gptq,
    "awq": awq,
    "auto-round": auto_round,
    "intel/auto-round": auto_round,
    "bitsandbytes": bitsandbytes,
    "modelopt": modelopt,
    "modelopt_fp4": modelopt,
}
# Suffixes of tensors that only quantized modules have.
MARKS = (*SCALES, "weight_packed", "qweight", "weight.absmax", "SCB")


def read_quantization(quantization: Any) -> Layout | None:
    """The layout that a quantization_config declares; None for gpt-oss's. CheckpointError for others."""
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"config.json: quantization_config: got {type(quantization).__name__}; expected an object"
        )
    if _WEIGHT in quantization:
        return _mistral(quantization)
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in _LAYOUTS:
        shown = repr(method[:80]) if isinstance(method, str) else method
        raise CheckpointError(
            f"config.json: quantization_config.quant_method: got {shown}; expected one of "
            f"{', '.join(_LAYOUTS)}; llm-compressor, GPTQModel, AutoRound and ModelOpt write these"
        )
    return _LAYOUTS[method](quantization)


SUFFIX = ".input_scale"


class InputScales:
    """Scales by module, read on first use.

    Kernels quantize a tensor once for all its readers: gate and up projection, the stacked query and latent
    projections, and the routed experts of a layer, which all read the layer's normed hidden states. If a file
    gives such siblings different scales, the largest is used, so that no range is clipped more than
    specified.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._scales: dict[str, float] = {}
        self._modules = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
        self.alike: Callable[[str], str] = str  # a name for what a module reads, as all that read it have

    @cached_property
    def _sharing(self) -> dict[str, list[str]]:
        sharing: dict[str, list[str]] = {}
        for module in self._modules:
            sharing.setdefault(self.alike(module), []).append(module)
        return sharing

    def __getitem__(self, module: str) -> float:
        """The scale of a module's input. Raises CheckpointError without the file; the reader adds it."""
        key = self.alike(module)
        if key not in self._scales:
            if module not in self._sharing.get(key, ()):
                raise CheckpointError("input_scale is missing, but input_activations are static")
            self._scales[key] = max(self._one(f"{each}{SUFFIX}") for each in self._sharing[key])
        return self._scales[key]

    def _one(self, name: str) -> float:
        tensor = self._read(name)
        value = float(tensor) if tensor.numel() == 1 else float("nan")
        if not 0 < value < float("inf"):
            raise CheckpointError(
                f"input_scale: found {tensor.flatten()[:4].tolist()}; expected one number > 0"
            )
        return value


log = logging.getLogger(__name__)

CONFIG, PARAMS = "config.json", "params.json"
MODELOPT = "hf_quant_config.json"  # beside a config.json that does not say how weights are quantized
FLOATS = ("float32", "bfloat16", "float16")


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a model directory, or params.json in Mistral's format. Raises CheckpointError."""
    if not has_config(path) or (path / CONFIG).is_file():
        config = read_json(path / CONFIG)
        if (path / MODELOPT).is_file() and not quantization_in(config):
            config["quantization_config"] = {"quant_method": "modelopt"} | read_json(path / MODELOPT)
        return config
    return {"model_type": "mistral_large_3"} | read_json(path / PARAMS)


def has_config(path: Path) -> bool:
    """Whether a directory has a model configuration."""
    return (path / CONFIG).is_file() or (path / PARAMS).is_file()


def has_weights(path: Path) -> bool:
    """Whether a directory has all weights beside its configuration, not only those that an interrupted
    download left."""
    if (path / GGUF_INDEX).is_file():
        return True
    index = next((path / name for name in (INDEX, MISTRAL_INDEX) if (path / name).is_file()), None)
    names = {SINGLE} if index is None else set(read_index(index).values())
    return all((path / name).is_file() for name in names)


class Checkpoint:
    """One checkpoint, opened by `Checkpoint.open`. arrays: tensors are numpy's, and torch is not imported.

    `weight` returns what the layout declared by config.json says (`_LAYOUTS`), of a GGUF file the format of
    the tensor's type, and else the matrix as stored: bf16, f16 or f32.
    """

    def __init__(self, path: Path, config: dict[str, Any], shards: Shards) -> None:
        self.path = path
        self.config = config
        self._shards = shards
        self._used: set[str] = set()
        self._layout: Layout | None = None
        self.input_scales = InputScales(shards.file_of, shards.read)
        if quantization := quantization_in(config):
            self._resolve(quantization)

    @classmethod
    def open(cls, path: Path, arrays: bool = False) -> Self:
        """Read config.json and the index without mapping any file. Raises CheckpointError."""
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; expected a Hugging Face model directory")
        config = read_config(path)
        opened = cls(path, config, GgufShards(path) if (path / GGUF_INDEX).is_file() else Shards(path))
        opened.arrays = arrays
        return opened

    @property
    def arrays(self) -> bool:
        """Whether tensors are numpy's, and torch is not imported."""
        return self._shards.arrays

    @arrays.setter
    def arrays(self, value: bool) -> None:
        self._shards.arrays = value

    def stored(self, name: str) -> str:
        """A tensor's or module's name in the files; this class reads by that name."""
        return name

    def names(self) -> Iterable[str]:
        """Every tensor name of the checkpoint."""
        return self._shards.file_of.keys()

    def has(self, name: str) -> bool:
        """Whether a tensor of this full name exists."""
        return name in self._shards.file_of

    @contextmanager
    def read_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Request tensors from the disk, in this order, before `tensor` and `weight` read them."""
        with ReadAhead(self.path, [(name, self._shards.file_of[name]) for name in names]) as ahead:
            self._shards.reading = ahead.passed
            yield

    def watch(self, progress: Progress) -> None:
        """Report the bytes of the tensors read so far, each counted once."""
        seen, done, total = set[str](), 0, self.stored_bytes()

        def read(name: str) -> None:
            nonlocal done
            if name not in seen:
                seen.add(name)
                done += self.nbytes(name)
                progress("loading", min(done, total), total)

        self._shards.reading = read

    def holds(self, module: str) -> bool:
        """Always true: every expert is local (`farthing.parallel` overrides this per rank)."""
        return True

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A plain parameter in its stored dtype, as a view of the mapped file: copy before writing.

        Raises CheckpointError if it is missing or has another shape.
        """
        self._claim(name)
        tensor: Any = self._shards.array(name) if self.arrays else self._shards.read(name)
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{self._where(name)}: {name}: expected shape {list(shape)}, found {list(tensor.shape)}"
            )
        return tensor  # type: ignore[no-any-return]

    def plain(self) -> bool:
        """Whether numpy arrays suffice for all of it: GGUF, floats, and FP8 in the blocks that kernels
        read."""
        if isinstance(self._shards, GgufShards):
            return True
        return self._layout in (None, Fp8()) and all(self.dtype(name) in DTYPES for name in self.names())

    def _claim(self, name: str) -> None:
        if not self.has(name):
            raise CheckpointError(f"{self._where(name)}: {name} is missing{self._hint(name)}")
        self._used.add(name)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """The matrix of a Linear module ('model.layers.0.mlp.gate_proj'), in its stored format."""
        if (whole := self._shards.weight(f"{module}.weight")) is not None:
            self._claim(f"{module}.weight")
            weight = whole
        elif scheme := self.scheme(module):
            weight = self._quantized(module, scheme)
        else:
            weight = self._dense(module)
        if shape is not None and weight.shape != tuple(shape):
            raise CheckpointError(
                f"{self._where(f'{module}.weight')}: {module}.weight: expected shape {list(shape)}, "
                f"found {list(weight.shape)}"
            )
        if ".experts." in module and self.has(bias := f"{module}.bias"):
            return replace(weight, bias=as_float32(self.tensor(bias, weight.shape[:1])))
        return weight

    def is_quantized(self, module: str) -> bool:
        """Whether the module is stored with scales."""
        return any(self.has(f"{module}.{s}") for s in MARKS) or self.in_groups(f"{module}.weight") is not None

    def scheme(self, module: str) -> Scheme | None:
        """How a module is stored that is quantized by config.json and in the files."""
        known = self._layout is not None and self.is_quantized(module)
        return self._layout.scheme(self.stored(module)) if self._layout and known else None

    def in_groups(self, name: str) -> tuple[Format, int] | None:
        """Format and columns of a group, from headers only, of a tensor that is whole in its own format."""
        return self._shards.stored(name)

    def stored_as(self, module: str) -> tuple[Format, tuple[int, int]]:
        """Format and shape of a matrix, from headers and config only."""
        if scheme := self.scheme(module):
            return scheme.format, scheme.shape(Parts(self, module))
        found = self.in_groups(f"{module}.weight")
        n, k = self.shape(f"{module}.weight")
        return found[0] if found else "dense", (n, k)

    def stored_bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.path / f).stat().st_size for f in set(self._shards.file_of.values()))

    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return tuple(self.path / name for name in sorted(set(self._shards.file_of.values())))

    def fingerprint(self) -> str:
        """A digest of config.json, the tensor-to-file map, and each file's size and last bytes, which tells
        checkpoints apart without reading them."""
        digest = hashlib.sha256(json.dumps([self.config, self._shards.file_of], sort_keys=True).encode())
        for name in sorted(set(self._shards.file_of.values())):
            digest.update(self._shards.tail(name))
        return digest.hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the header; does not mark it as used."""
        return self._shards.shape(name)

    def nbytes(self, name: str) -> int:
        """Bytes of a stored tensor, from the header; does not mark it as used."""
        return self._shards.nbytes(name)

    def dtype(self, name: str) -> str:
        """Dtype of a stored tensor as safetensors names it, from the header; does not mark it as used."""
        return self._shards.dtype(name)

    def release(self) -> None:
        """Unmap the files to release resident memory; they are mapped again on demand."""
        self._shards.release()

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """Raise CheckpointError for tensors never read that match no fnmatch pattern in `ignore`."""
        if self._layout:
            ignore = (*ignore, *self._layout.unread)
        unused = [
            n
            for n in self.names()
            if n not in self._used and not any(fnmatchcase(n, pattern) for pattern in ignore)
        ]
        if unused:
            first = unused[0]
            raise CheckpointError(
                f"{self._where(first)}: {first} with shape {list(self.shape(first))} was not used"
                + (f", nor were {len(unused) - 1} more (next: {unused[1]})" if len(unused) > 1 else "")
                + "; expected a checkpoint of exactly the architecture config.json describes"
            )

    # -- resolving

    def _resolve(self, quantization: Any) -> None:
        try:
            self._layout = read_quantization(quantization)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}/{error}") from None

    def _dense(self, module: str) -> Weight:
        name = f"{module}.weight"
        if self.is_quantized(module):
            raise CheckpointError(
                f"{self._where(name)}: {module} is stored quantized, but config.json's quantization_config "
                "does not target it; expected a config group that names it"
            )
        data = self.tensor(name)
        if dtype_name(data.dtype) not in FLOATS:
            wanted = f"it next to one of {', '.join(MARKS)}" if self._layout else " or ".join(FLOATS)
            raise CheckpointError(f"{self._where(name)}: {name}: found {data.dtype}, expected {wanted}")
        if data.ndim != 2:
            raise CheckpointError(
                f"{self._where(name)}: {name}: expected a matrix, found shape {list(data.shape)}"
            )
        return Weight("dense", data)

    def input_scale(self, module: str) -> float:
        """The calibrated scale of a module's input, and of all that read the same."""
        return self.input_scales[module]

    def _quantized(self, module: str, scheme: Scheme) -> Weight:
        try:
            weight = scheme.read(Parts(self, module))
            if isinstance(scheme, ct.Scheme):
                weight = ct.fitted(weight, self.config.get(ct.MARK))
            return self._checked(module, weight)
        except CheckpointError as error:
            if str(error).startswith(str(self.path)):
                raise
            raise CheckpointError(f"{self._where(f'{module}.weight')}: {module}.{error}") from None

    def _checked(self, module: str, weight: Weight) -> Weight:
        if weight.scale is not None and not all_finite(weight.scale):
            raise CheckpointError(
                f"{self._where(f'{module}.weight')}: {module}: expected finite scales, found NaN or infinity"
            )
        return weight

    def _where(self, name: str) -> str:
        """The file of a tensor, or the index that should list it."""
        files = self._shards.file_of
        sibling = name.rpartition(".")[0]
        file = files.get(name) or next((f for n, f in files.items() if n.startswith(f"{sibling}.")), None)
        return str(self.path / file) if file else str(self.path)

    def _hint(self, name: str) -> str:
        parent = name.rpartition(".")[0]
        siblings = sorted(n for n in self.names() if n.startswith(f"{parent}."))[:4]
        return (
            f"; found {', '.join(siblings)}"
            if siblings
            else f"; expected it next to {len(list(self.names()))} others"
        )
