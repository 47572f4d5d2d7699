"""Tensors on disk <-> tensors in memory."""

from farthing.checkpoint.compressed_tensors import GroupKey, key_of
from farthing.checkpoint.reader import (
    Checkpoint,
    has_config,
    has_weights,
    quantization_in,
    read_config,
    read_quantization,
)
from farthing.checkpoint.shards import CheckpointError
from farthing.checkpoint.writer import CheckpointWriter, copy_companions

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "GroupKey",
    "copy_companions",
    "has_config",
    "has_weights",
    "key_of",
    "quantization_in",
    "read_config",
    "read_quantization",
]
