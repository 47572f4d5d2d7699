"""Models that other programs keep on this machine, read in place: Ollama, LM Studio and llama.cpp."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_PART = re.compile(r"(.*)-(\d{5})-of-\d{5}")
_DIGEST = re.compile("sha256:([0-9a-f]{64})")
_MODEL_LAYER = "application/vnd.ollama.image.model"
_OLLAMA_HUB = "registry.ollama.ai"  # names of models from there begin after it


@dataclass(frozen=True, slots=True)
class Stored:
    """A model of another program. name: as `farthing serve` takes it, such as ollama:qwen3:8b."""

    name: str
    path: Path  # a GGUF file, the first one of a split model; or a directory with a configuration
    size: int  # bytes


def stored() -> Iterator[Stored]:
    """The models of all programs."""
    for program, models in _PROGRAMS.items():
        for name, path, size in models():
            yield Stored(f"{program}:{name}", path, size)


def program_of(name: str) -> str | None:
    """The program that a name such as ollama:qwen3:8b begins with; None for other names."""
    program = name.partition(":")[0]
    return program if program in _PROGRAMS and ":" in name else None


def find(name: str) -> Path:
    """The file or directory of a model. Raises FileNotFoundError with the names that are closest."""
    known = {model.name: model.path for model in stored() if program_of(model.name) == program_of(name)}
    for full in (name, f"{name}:latest"):
        if full in known:
            return known[full]
    close = get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:3]
    expected = f"expected a name that `farthing list` shows, such as {', '.join(close)}"
    none = f"no model of {program_of(name)} is on this machine"
    raise FileNotFoundError(f"model: got {name!r}; {expected if close else none}")


def _ollama() -> Iterator[tuple[str, Path, int]]:
    """By its manifests, each of which names the blob with the weights."""
    user, service = Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")
    given = os.environ.get("OLLAMA_MODELS")
    for home in (Path(given),) if given else (user, service):
        for file in sorted((home / "manifests").glob("*/*/*/*")):
            layers = _layers(file)
            weights = next((layer for layer in layers if layer.get("mediaType") == _MODEL_LAYER), None)
            digest = _DIGEST.fullmatch(str((weights or {}).get("digest")))
            if digest is None or not (blob := home / "blobs" / f"sha256-{digest[1]}").is_file():
                continue
            host, owner, model, tag = file.parts[-4:]
            parts = [host] * (host != _OLLAMA_HUB) + [owner] * (owner != "library") + [model]
            yield f"{'/'.join(parts)}:{tag}", blob, blob.stat().st_size


def _layers(manifest: Path) -> list[dict[str, Any]]:
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _lmstudio() -> Iterator[tuple[str, Path, int]]:
    """In a folder per publisher and repository."""
    for home in (Path.home() / ".lmstudio/models", Path.home() / ".cache/lm-studio/models"):
        for folder in sorted(home.glob("*/*")):
            publisher = f"{folder.parent.name}/{folder.name}"
            yield from ((f"{publisher}/{name}", path, size) for name, path, size in _gguf_in(folder))
            if (folder / "config.json").is_file():
                size = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
                yield publisher, folder, size


def _llama_cpp() -> Iterator[tuple[str, Path, int]]:
    """In one folder; newer versions use the hub's cache."""
    yield from _gguf_in(Path(os.environ.get("LLAMA_CACHE") or Path.home() / ".cache/llama.cpp"))


def _gguf_in(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """The models of a folder; projectors of images are none."""
    models: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.gguf")):
        part = _PART.fullmatch(file.stem)
        if "mmproj" not in file.stem:
            models.setdefault(part[1] if part else file.stem, []).append(file)
    for name, files in models.items():
        yield name, files[0], sum(file.stat().st_size for file in files)


_PROGRAMS: dict[str, Callable[[], Iterator[tuple[str, Path, int]]]] = {
    "ollama": _ollama,
    "lmstudio": _lmstudio,
    "llama.cpp": _llama_cpp,
}
