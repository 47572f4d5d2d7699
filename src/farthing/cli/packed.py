"""Packed files in the user's cache directory, written by the first start of `farthing serve`."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from farthing import __version__
from farthing.checkpoint.reader import Checkpoint
from farthing.config import AUTO, EngineConfig, Quantization
from farthing.files import BeingWritten
from farthing.hub import EMBEDDED, Found
from farthing.process import Progress, cache_dir, page_in, unseen

if TYPE_CHECKING:
    from farthing.engine.engine import Engine

log = logging.getLogger(__name__)


def with_packed(config: EngineConfig, path: Path, progress: Progress | None = unseen) -> EngineConfig:
    """The configuration with the packed file that `--packed auto`, the default of the embedded models, means;
    without one where packed weights cannot serve. progress: of writing a missing file; None leaves it."""
    wanted = config.packed == AUTO or (config.packed is None and config.model == EMBEDDED)
    if not wanted:
        return config
    if config.deterministic or config.num_ranks > 1 or not (config.on_this_cpu and _packs(config.backend)):
        return replace(config, packed=None)
    if progress is None:
        with suppress(RuntimeError):  # without a home directory
            if _is_whole(file := _cached_file(path, config.quantization)):
                return replace(config, packed=str(file))
        return config
    written = _pack_once(path, config.quantization, config.threads, progress)
    return replace(config, packed=None if written is None else str(written))


def read_packed(config: EngineConfig) -> None:
    """Start to read the packed file in the background, if it is known which one. Raises ValueError for what
    is no packed file."""
    if config.packed not in (None, AUTO):
        from farthing.ops.cpu.packed import PackedFile

        page_in(PackedFile(str(config.packed)).path)


def _cached_file(path: Path, quantization: Quantization | None) -> Path:
    """The packed file of a model directory below the user's cache directory, whether it exists or not; one
    per installation. Raises RuntimeError without a home directory."""
    native = find_spec("farthing._native")
    built = Path(native.origin).stat().st_mtime_ns if native and native.origin else 0
    installed = sha256(f"{__version__} {built}".encode()).hexdigest()
    model = f"{path.name}-{Checkpoint.open(path).fingerprint()[:16]}-{quantization or 'as-stored'}"
    return cache_dir() / "packed" / f"{model}-{installed[:8]}.packed"


def _pack_once(
    path: Path,
    quantization: Quantization | None = None,
    threads: int | None = None,
    progress: Progress = unseen,
) -> Path | None:
    """The packed file in the cache, written if it is missing, in place of those of other installations; None
    where it cannot be written."""
    from farthing.model.pack import pack_checkpoint  # numpy, which a refused model does not need

    try:
        file = _cached_file(path, quantization)
        if not _is_whole(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            pack_checkpoint(path, file, quantization, threads, progress)
            for other in set(file.parent.glob(f"{file.stem[:-8]}*.packed")) - {file}:
                other.unlink(missing_ok=True)
    except (OSError, RuntimeError, BeingWritten) as error:
        log.info("%s is not packed for the next start: %s", path, error)
        return None
    return file


def _is_whole(file: Path) -> bool:
    """Whether a packed file exists and opens; a damaged one is written again."""
    from farthing.ops.cpu.packed import PackedFile

    try:
        PackedFile(file)
    except ValueError:
        return False
    return True


def _packs(backend: str) -> bool:
    """Whether a backend's weights are packed."""
    return backend.partition("/")[0] in ("auto", "cpu") and find_spec("farthing._native") is not None


def load(config: EngineConfig, model: Found, told: Progress = unseen) -> Engine:
    """The engine of a model, which is fetched and packed first; progress is shown, and `told`."""
    from farthing.engine.build import build_engine  # imports torch

    if config.packed not in (None, AUTO):  # mapped at once
        engine = build_engine(replace(config, model=str(model.fetch())))
    else:
        from farthing.cli.tables import step_progress

        with step_progress("starting", log.info) as shown:

            def progress(what: str, done: int, total: int) -> None:
                shown(what, done, total)
                told(what, done, total)

            path = model.fetch(progress)
            packed = with_packed(config, path, progress)
            engine = build_engine(replace(packed, model=str(path)), progress)
    return engine
