"""Find a model: the embedded one by name, a local directory, or a Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDDED = "mite"
_FORMER_NAME = "reference"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # "./x" and "../x" are paths
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]


def resolve_model(model: str | Path) -> Path:
    """The directory with a model's config.json. Hub ids are downloaded with huggingface_hub.

    Raises FileNotFoundError or ValueError with the accepted values.
    """
    path = Path(model).expanduser()
    if any((path / name).is_file() for name in ("config.json", "params.json")):
        return path
    if str(model) == EMBEDDED:
        return _embedded()
    if path.exists():
        raise FileNotFoundError(
            f"model: got {str(model)!r}, which has no config.json; expected a Hugging Face model directory"
        )
    if str(model) == _FORMER_NAME:
        raise FileNotFoundError(
            f"model: got {_FORMER_NAME!r}, the former name of the embedded model; expected {EMBEDDED!r}"
        )
    if not _HUB_ID.fullmatch(str(model)):
        raise FileNotFoundError(
            f"model: got {str(model)!r}; expected '{EMBEDDED}', a directory, or a hub id like 'owner/name' "
            "(names of published models are known only to `farthing inspect` and `farthing plan`)"
        )
    return _download(str(model))


def _embedded() -> Path:
    path = Path(__file__).parent / "assets" / EMBEDDED
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded model is not installed ({path} has no config.json); pass a directory or a hub id, "
            f"or train it with: farthing train {EMBEDDED}"
        )
    return path


def _download(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"model: got {model!r}, which is not a local directory; downloading it from the hub needs: "
            "pip install huggingface_hub"
        ) from error
    return Path(snapshot_download(model, allow_patterns=_FILES))
