"""The checkpoint as it was before anything was compressed: what `farthing bench cost` starts from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from farthing.checkpoint import Checkpoint, CheckpointWriter


@contextmanager
def bf16_checkpoint(path: Path) -> Iterator[Path]:
    """`path` itself where its weights are dense, else a copy with bfloat16 weights that goes with the block.

    Hugging Face needs it: there DeepSeek's FP8 format runs on a GPU only.
    """
    checkpoint = Checkpoint.open(path)
    if not any(checkpoint.is_quantized(name.removesuffix(".weight")) for name in _matrices(checkpoint)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="farthing-bf16-") as directory:
        _write(checkpoint, Path(directory))
        yield Path(directory)


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """Names of weights, one a module, however they are stored."""
    ends = (".weight", ".weight_packed")
    return sorted({f"{n.rpartition('.')[0]}.weight" for n in checkpoint.names() if n.endswith(ends)})


def _write(checkpoint: Checkpoint, path: Path) -> None:
    writer = CheckpointWriter(path)
    quantized = {name for name in _matrices(checkpoint) if checkpoint.is_quantized(name[: -len(".weight")])}
    for name in quantized:
        writer.add(name, checkpoint.weight(name[: -len(".weight")]).dequantize(torch.bfloat16))
    for name in checkpoint.names():
        if f"{name.rpartition('.')[0]}.weight" not in quantized:
            writer.add(name, checkpoint.tensor(name))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    writer.close(config, copy_from=checkpoint.path)
