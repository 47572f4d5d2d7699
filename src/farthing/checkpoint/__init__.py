"""Tensors on disk <-> tensors in memory."""

from farthing.checkpoint.error import CheckpointError
from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointError", "CheckpointWriter"]
