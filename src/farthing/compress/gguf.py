"""Write a checkpoint as one GGUF file.

Quantized matrices keep their integers where GGUF has a type for them, so that a calibrated checkpoint stays
calibrated; others are rounded to the nearest.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from farthing.checkpoint.gguf_types import WRITTEN
from farthing.checkpoint.reader import Checkpoint
from farthing.engine.tokenizer import Tokenizer, generation_defaults
from farthing.files import replace
from farthing.lazy import gguf, np
from farthing.memory import gigabytes
from farthing.model import DeltaHeads, ModelConfig
from farthing.model.gguf import ENDS, SAMPLING
from farthing.model.gguf_metadata import architecture_of, metadata_of, read_back
from farthing.model.gguf_write import GgufTensors, Kept, Stored
from farthing.tokenizer_gguf import fields_of

log = logging.getLogger(__name__)
SUFFIX = ".gguf"
_TYPES = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}


def check_export(config: ModelConfig, out: Path, kind: str | None) -> None:
    """Raise ValueError for what is refused of a model of which only the configuration is known."""
    if out.suffix != SUFFIX or not out.absolute().parent.is_dir():
        raise ValueError(f"out: got {str(out)!r}; expected a {SUFFIX} file in an existing directory")
    if kind is not None and kind.upper() not in WRITTEN:
        raise ValueError(f"type: got {kind!r}; expected {', '.join(WRITTEN).lower()}")
    architecture_of(config)
    if config.uneven:
        raise ValueError("model: its layers differ in size (layer_sizes), which GGUF cannot say")


def export_gguf(
    path: Path, out: Path, kind: str | None = None, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Kept]:
    """Write the model directory `path` to `out`, which appears once it is complete; returns how matrices were
    stored, by type.

    kind: the type of dense and FP8 matrices, see `GgufTensors`. Raises ConfigError, CheckpointError or
    ValueError before any work, OSError for too small a disk.
    """
    checkpoint = Checkpoint.open(path)
    written = GgufTensors(checkpoint, kind and kind.upper())
    check_export(written.config, out, kind)
    metadata = metadata_of(written.config, written.architecture)
    general = {"general.architecture": written.architecture}
    read_back(written.config, out, general | metadata, written.read_as(), written.factors)
    metadata |= {"general.type": "model", "general.name": path.name, "general.quantization_version": 2}
    metadata |= _tokenizer(path, written)
    stated = generation_defaults(path)
    metadata |= {SAMPLING[name][0]: stated[name] for name in SAMPLING if name in stated}
    for field, what in (("num_nextn_predict_layers", "MTP layer"), ("adaptive_experts", "adaptive rule")):
        if checkpoint.config.get(field):
            log.warning("%s: the %s of the model is left out", out, what)
    tensors = list(written)
    for reason in _not_in_llama_cpp(written.config, written.architecture, {t.name for t in tensors}):
        log.warning("%s: llama.cpp %s; Farthing reads the file", out, reason)
    needed, free = sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise OSError(f"{out} needs {gigabytes(needed)}, and {gigabytes(free)} are free; free some space")

    def write(file: Path) -> None:
        _write_header(file, written.architecture, metadata, tensors)
        done = 0
        with file.open("ab") as stream:
            for tensor in tensors:
                try:
                    for part in tensor.parts():
                        stream.write(np.ascontiguousarray(part).data)
                        done += part.nbytes
                        if progress:
                            progress(f"writing {out.name}", done >> 10, needed >> 10)
                except ValueError as error:
                    raise ValueError(f"{tensor.name}: {error}") from None
                stream.write(bytes(-stream.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
                checkpoint.release()

    replace(out, write)
    return dict(sorted(written.kept.items()))


_OWN_HEAD = ("dots1", "gpt-oss", "minimax-m2", "olmoe", "qwen2moe")  # llama.cpp never ties it
_WHOLE_HEADS = ("dots1", "olmoe")  # whose queries never share keys there


def _not_in_llama_cpp(config: ModelConfig, architecture: str, names: Set[str]) -> Iterator[str]:
    """What llama.cpp refuses or computes otherwise of a model that GGUF can say; `names` of its tensors."""
    if config.head.tie_word_embeddings and architecture in _OWN_HEAD:
        yield f"refuses {architecture} files without output.weight, and this model's head is its embedding"
    heads = config.attention
    if architecture in _WHOLE_HEADS and heads.cache_rows < heads.query_heads:
        yield f"refuses {architecture} files whose keys have fewer heads than queries, as this model's"
    biased = "blk.0.attn_output.bias" in {re.sub(r"\d+", "0", name) for name in names}
    if biased != (architecture == "gpt-oss") and architecture != "llama":  # there it is optional
        has = "has" if biased else "lacks"
        yield f"refuses {architecture} files whose attention {has} a bias on its output, as this model's"
    deltas = (mixer.spec for mixer in config.mixers if isinstance(mixer, DeltaHeads))
    if (s := next(deltas, None)) is not None and s.key_dim != s.value_dim:
        dims = f"{s.key_dim} and {s.value_dim}"
        yield f"refuses {architecture} files whose keys and values of Gated DeltaNet differ in width ({dims})"
    router = config.experts.router if config.experts else None
    if router is not None and router.num_groups > 1 and router.group_score == "max":
        yield "ranks groups of experts by their best two, not their best one, and so chooses other experts"


def _write_header(
    file: Path, architecture: str, metadata: Mapping[str, Any], tensors: Sequence[Stored]
) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType[_TYPES[type(value)]])
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("ab") as stream:
        stream.write(bytes(-stream.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _tokenizer(path: Path, written: GgufTensors) -> dict[str, Any]:
    """The fields of the tokenizer and the chat template. Raises ValueError or FileNotFoundError."""
    tokenizer = Tokenizer.from_directory(path, written.config.eos_token_ids)
    where = str(path / "tokenizer.json")
    fields = fields_of(where, tokenizer.backend, written.config.vocab_size, written.architecture)
    bos = tokenizer.bos_token_id
    if bos is not None:
        fields |= {"bos_token_id": bos, "add_bos_token": tokenizer.encode("")[:1] == [bos]}
    fields |= {f"{end}_token_id": i for end, i in zip(ENDS, tokenizer.eos_token_ids, strict=False)}
    found = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    template = tokenizer.chat_template
    return found | ({"tokenizer.chat_template": template} if template else {})
