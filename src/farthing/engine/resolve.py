"""MODEL on a command line to a directory: the embedded model, a path, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDDED = "reference"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # "./x" and "../x" are paths
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]


def resolve_model(model: str | Path) -> Path:
    """The directory of a model. Hub ids are downloaded through huggingface_hub where it is installed.

    Raises FileNotFoundError or ValueError saying what would be accepted.
    """
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if str(model) == EMBEDDED:
        embedded = Path(__file__).parents[1] / "models" / EMBEDDED
        if not (embedded / "config.json").is_file():
            raise FileNotFoundError(
                f"the embedded model is not installed ({embedded} has no config.json); expected a model "
                f"directory or a hub id; or train it: farthing train reference"
            )
        return embedded
    if path.exists():
        raise FileNotFoundError(
            f"model is {str(model)!r}, which has no config.json; expected a Hugging Face directory"
        )
    if not _HUB_ID.fullmatch(str(model)):
        raise FileNotFoundError(
            f"model is {str(model)!r}; expected '{EMBEDDED}', a directory, or a hub id like 'owner/name'"
        )
    return _download(str(model))


def _download(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"model is {model!r}, no directory here; to download it from the hub: pip install huggingface_hub"
        ) from error
    return Path(snapshot_download(model, allow_patterns=_FILES))
