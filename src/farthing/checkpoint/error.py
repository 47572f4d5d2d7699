"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: names the file, the tensor, what was expected and what was found."""
