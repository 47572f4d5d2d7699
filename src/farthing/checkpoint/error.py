"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file, the tensor, the expected and found values."""
