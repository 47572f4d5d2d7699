"""Tensors on disk <-> tensors in memory."""

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.shards import CheckpointError
from farthing.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointError", "CheckpointWriter"]
