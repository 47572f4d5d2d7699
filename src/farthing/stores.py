"""Models that other programs keep on this machine, read in place: Ollama, LM Studio and llama.cpp."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_PART = re.compile(r"(.*)-(\d{5})-of-\d{5}")
_DIGEST = re.compile("sha256:([0-9a-f]{64})")
_LAYER = re.compile(r"application/vnd\.ollama\.image\.(model|adapter|system|params)")
# Of Ollama's parameters, those that generation_config.json has, and their names there.
_PARAMETERS = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "presence_penalty")},
    **{"frequency_penalty": "frequency_penalty", "repeat_penalty": "repetition_penalty"},
    "stop": "stop_strings",
}
_MOST_SAID = 1 << 20  # bytes of a system prompt or of parameters
_OLLAMA_HUB = "registry.ollama.ai"  # names of models from there begin after it


@dataclass(frozen=True, slots=True)
class Stored:
    """A model of another program. name: as `farthing serve` takes it, such as ollama:qwen3:8b."""

    name: str
    path: Path  # a GGUF file, the first one of a split model; or a directory with a configuration
    size: int  # bytes
    layers: Mapping[str, Path] = field(default_factory=dict)  # of Ollama, by kind

    def system(self) -> str:
        """What the first turn of a conversation says that brings none of its own. Raises ValueError."""
        return self._text("system")

    def generation(self) -> dict[str, Any]:
        """What the model adds to its generation_config.json. Raises ValueError naming the parameter."""
        text = self._text("params")
        try:
            given = json.loads(text or "{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ValueError(f"{self.layers['params']}: expected a JSON object, Ollama's parameters")
        for name, value in given.items():
            texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in _PARAMETERS and not (texts if name == "stop" else number):
                expected = "texts" if name == "stop" else "a number"
                raise ValueError(f"{self.layers['params']}: {name}: got {value!r:.80}; expected {expected}")
        return {ours: given[name] for name, ours in _PARAMETERS.items() if name in given}

    def _text(self, kind: str) -> str:
        if (blob := self.layers.get(kind)) is None:
            return ""
        if blob.stat().st_size > _MOST_SAID:
            raise ValueError(f"{blob}: got {blob.stat().st_size} bytes; expected at most {_MOST_SAID}")
        return blob.read_text(encoding="utf-8")


def stored() -> Iterator[Stored]:
    """The models of all programs."""
    for program, models in _PROGRAMS.items():
        for name, *rest in models():
            yield Stored(f"{program}:{name}", *rest)


def program_of(name: str) -> str | None:
    """The program that a name such as ollama:qwen3:8b begins with; None for other names."""
    program = name.partition(":")[0]
    return program if program in _PROGRAMS and ":" in name else None


def find(name: str) -> Stored:
    """A model by its name. Raises FileNotFoundError with the names that are closest; ValueError for one
    whose weights are in two files of which one changes the other."""
    known = {model.name: model for model in stored() if program_of(model.name) == program_of(name)}
    for full in (name, f"{name}:latest"):
        if full in known:
            if "adapter" in known[full].layers:
                raise ValueError(f"model: got {name!r}, which has an adapter; expected a model of one piece")
            return known[full]
    close = get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:3]
    expected = f"expected a name that `farthing list` shows, such as {', '.join(close)}"
    none = f"no model of {program_of(name)} is on this machine"
    raise FileNotFoundError(f"model: got {name!r}; {expected if close else none}")


def _ollama() -> Iterator[tuple[str, Path, int, Mapping[str, Path]]]:
    """By its manifests, each of which names the blobs of the weights and of what belongs to them."""
    user, service = Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")
    given = os.environ.get("OLLAMA_MODELS")
    for home in (Path(given),) if given else (user, service):
        for file in sorted((home / "manifests").glob("*/*/*/*")):
            layers = dict(_layers(file, home / "blobs"))
            if (blob := layers.get("model")) is None:
                continue
            host, owner, model, tag = file.parts[-4:]
            parts = [host] * (host != _OLLAMA_HUB) + [owner] * (owner != "library") + [model]
            yield f"{'/'.join(parts)}:{tag}", blob, blob.stat().st_size, layers


def _layers(manifest: Path, blobs: Path) -> Iterator[tuple[str, Path]]:
    """The kind and the blob of each layer that is here; no other file, whatever the manifest says."""
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict):
            kind = _LAYER.fullmatch(str(layer.get("mediaType")))
            digest = _DIGEST.fullmatch(str(layer.get("digest")))
            if kind and digest and (blob := blobs / f"sha256-{digest[1]}").is_file():
                yield kind[1], blob


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


_PROGRAMS: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "ollama": _ollama,
    "lmstudio": _lmstudio,
    "llama.cpp": _llama_cpp,
}
