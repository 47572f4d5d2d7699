"""The models of `farthing serve --models`: their names and options, and the memory that each needs."""

from __future__ import annotations

import logging
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from farthing.checkpoint.reader import has_config, read_config, stored_as
from farthing.config import AUTO, EngineConfig, as_arguments, check_length, parse_bytes
from farthing.conversation.select import Checkpoint, choose
from farthing.engine.tokenizer import Tokenizer
from farthing.hub import resolve_config, resolve_shapes
from farthing.memory import available_memory, gigabytes
from farthing.model.config import ModelConfig
from farthing.planner.buffers import Serving
from farthing.planner.fit import needed, worth_packing
from farthing.server.config import Given, ServerConfig

log = logging.getLogger("farthing.server")

_T = TypeVar("_T")

_PER_MODEL = ("tool_call_parser", "reasoning_parser")  # options of the server that a model may have, too
# What the server in front decides: the others answer only to it.
_IN_FRONT = {
    "host": "127.0.0.1",
    "insecure": False,
    "root_path": "",
    "allowed_hosts": (),
    "allowed_origins": (),
    "mcp": None,
}
_DEFAULTS = EngineConfig()
# Options that take memory which is not counted.
_ELSEWHERE = ("device", "nodes", "experts_on", "disaggregate")
_SHARE = 0.8  # of the available memory, for all models
_CONTEXT = 32_768  # default tokens of context, where the model has as many and they fit
_CACHES = 4  # caches of a whole context, where they fit
_DEEPEST = 4  # folders between a folder of models and a file, as in the hub's cache
_PROCESS = 300 << 20  # bytes of a server process besides weights, cache and buffers


@dataclass(frozen=True)
class Preset:
    """A model that may be loaded. name: as requests name it."""

    name: str
    engine: EngineConfig
    server: ServerConfig

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json."""
        return read_config(self._path)

    @cached_property
    def type(self) -> str:
        """The model type."""
        return str(self.config.get("model_type"))

    @cached_property
    def stored(self) -> str:
        """The format of the model's files."""
        return stored_as(self._path)

    @cached_property
    def _path(self) -> Path:
        return resolve_config(self.engine.model)

    @cached_property
    def capabilities(self) -> tuple[str, ...]:
        """What the model's chat format can do, found without the model."""
        try:
            tokenizer = Tokenizer.from_directory(self._path)
        except (OSError, ValueError):
            return ("completion",)
        own = None if tokenizer.trusted_template else tokenizer.chat_template
        checkpoint = Checkpoint(
            self.type, own, lambda token: tokenizer.backend.token_to_id(token) is not None
        )
        parsers = self.server.tool_call_parser, self.server.reasoning_parser
        return choose(checkpoint, self.engine.chat_template, *parsers).capabilities

    def sized(self, limit: int, key_file: Path | None = None) -> Sized:
        """With a context and a cache for which the model fits the limit. Raises ValueError if none does.

        key_file: the keys that its server accepts, besides those in the environment."""
        path, engine = resolve_shapes(self.engine.model), self.engine
        longest = ModelConfig.from_json(self.config).max_position_embeddings
        check_length(engine.max_model_len, longest)
        context = engine.max_model_len or min(longest, _CONTEXT)
        caches = _CACHES
        while True:
            sequences = min(engine.max_num_seqs, 64)
            serving = Serving(
                caches * context, context, sequences, threads=engine.threads, exact=engine.exact
            )
            ranks = needed(path, engine.quantization, serving, engine.sizes, engine.halves)
            cache = engine.kv_cache_memory or sum(rank.cache for rank in ranks)
            size = cache + sum(rank.total - rank.cache + _PROCESS for rank in ranks)
            if size <= limit:
                break
            if caches > 1:
                caches //= 2
            elif engine.max_model_len is None and engine.kv_cache_memory is None and context > 512:
                context //= 2
            else:
                raise ValueError(
                    f"model: {self.name} needs {gigabytes(size)}; expected at most the {gigabytes(limit)} of "
                    "--models-memory, by a smaller model, kv_cache_memory or max_model_len"
                )
        if engine.num_blocks is None:
            engine = replace(engine, kv_cache_memory=cache, max_model_len=context)
        if engine.packed is None and worth_packing(path, sum(rank.weights for rank in ranks)):
            engine = replace(engine, packed=AUTO)
        return Sized(self, engine, size, key_file)


@dataclass(frozen=True, slots=True)
class Sized:
    """A preset with what `sized` chose. size: bytes of its process at most."""

    preset: Preset
    engine: EngineConfig
    size: int
    key_file: Path | None

    def command(self, port: int) -> list[str]:
        """The command that serves the model to this machine."""
        server = replace(self.preset.server, port=port, served_model_name=(self.preset.name,))
        return [
            *(sys.executable, "-m", "farthing", "serve"),
            *as_arguments(self.engine),
            *as_arguments(server),
            *(("--api-key-file", str(self.key_file)) if self.key_file else ()),
        ]


def read_models(source: Path, given: Given, memory: str | None) -> tuple[list[Sized], int]:
    """The models that may be loaded, and the bytes that they may have together. memory: of the command line.

    Raises as `read_presets` does; a model that does not fit, or whose files are damaged, cannot be served.
    """
    share = int(_SHARE * available_memory())
    limit = share if memory is None else parse_bytes("models_memory", memory)
    models = []
    for preset in read_presets(source, given):
        with _judged(source, preset.name):
            models.append(preset.sized(limit, given.key_file))
    return _some(models, source), limit


def read_presets(source: Path, given: Given) -> list[Preset]:
    """The presets of a folder of models, or of a TOML file with a table per model, whose options replace the
    given ones.

    Raises FileNotFoundError or ValueError with the accepted values; models of a folder that cannot be served
    are left out.
    """
    if (model := given.engine.get("model", EngineConfig().model)) != EngineConfig().model:
        raise ValueError(f"model: got {model!r} with --models, which names all; expected none")
    if source.is_dir():
        found: dict[str, dict[str, Any]] = {}
        for name, path in _models_in(source):  # several may share a name
            inside = path.relative_to(source).as_posix()
            name = next(each for each in (name, path.name, inside) if each not in found)
            found[name] = {"model": str(path)}
    elif source.is_file():
        found = _tables(source)
    else:
        raise FileNotFoundError(f"models: got {str(source)!r}; expected a folder of models, or a TOML file")
    presets = []
    for name, options in found.items():
        with _judged(source, name):
            preset = _preset(name, options, given)
            preset.type  # noqa: B018  (judges config.json)
            presets.append(preset)
    return _some(presets, source)


@contextmanager
def _judged(source: Path, name: str) -> Iterator[None]:
    """What cannot be served is left out of a folder, and an error in a file, which names it on purpose."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not source.is_dir():
            raise ValueError(f"models: [{name}]: {error}") from error
        log.warning("models: %s is left out: %s", name, error)


def _some(models: list[_T], source: Path) -> list[_T]:
    if not models:
        raise ValueError(f"models: {str(source)!r} has no model that can be served")
    return models


def _models_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """All of a folder and of its subfolders; says which of these has none."""
    for path in sorted(folder.iterdir()):
        models = list(_models_at(path, _DEEPEST))
        if not models and path.is_dir() and not path.name.startswith("."):
            log.warning("models: %s is left out: it has no config.json and no GGUF file", path.name)
        yield from models


def _models_at(path: Path, depth: int) -> Iterator[tuple[str, Path]]:
    """A directory with a configuration, a GGUF file, of a split one the first part, or those in a folder."""
    if path.is_dir():
        if has_config(path):
            yield path.name, path
        elif depth and not path.name.startswith(".") and not (depth < _DEEPEST and path.is_symlink()):
            for inner in sorted(path.iterdir()) if os.access(path, os.R_OK | os.X_OK) else ():
                yield from _models_at(inner, depth - 1)
    elif path.suffix == ".gguf" and "mmproj" not in path.stem:
        name, part, _ = path.stem.rpartition("-00001-of-")
        if part or "-of-" not in path.stem:
            yield name or path.stem, path


def _tables(file: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"models: {str(file)!r} is no TOML: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict) or not isinstance(table.get("model"), str):
            raise ValueError(f"models: {name!r}: expected a table with at least `model`, as `serve` takes it")
    return tables


def _preset(name: str, options: Mapping[str, Any], given: Given) -> Preset:
    own = {key.replace("-", "_"): value for key, value in options.items()}
    sizes = {each for each in ("kv_cache_memory", "prefix_cache_disk_bytes") if each in own}
    own |= {each: parse_bytes(each, own[each]) for each in sizes}
    known = {each.name for each in fields(EngineConfig)}
    if unknown := sorted(own.keys() - known - {*_PER_MODEL}):
        raise ValueError(f"{unknown[0]}: no such option; expected one of `farthing serve` about the model")
    of_server = {each: own.pop(each) for each in _PER_MODEL if each in own}
    config = EngineConfig(**{**given.engine, **own})
    elsewhere = next((each for each in _ELSEWHERE if getattr(config, each) != getattr(_DEFAULTS, each)), None)
    if elsewhere or not config.on_this_cpu:
        option = elsewhere or "backend"
        raise ValueError(
            f"{option}: got {getattr(config, option)!r}; expected the CPU of this machine, whose memory "
            "several models share"
        )
    return Preset(name, config, ServerConfig(**{**given.server, **of_server, **_IN_FRONT}))
