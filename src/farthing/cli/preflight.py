"""What `farthing serve` finds out before it opens a port, and before it downloads weights; what it packs."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from farthing import __version__
from farthing.checkpoint.gguf import INDEX
from farthing.checkpoint.reader import Checkpoint
from farthing.config import EngineConfig, Quantization
from farthing.files import BeingWritten
from farthing.hub import EMBEDDED, Found, find_model
from farthing.memory import available_memory, gigabytes
from farthing.planner.fit import certainly_fits, fit, weight_bytes
from farthing.process import Progress, cache_dir, unseen

log = logging.getLogger(__name__)
AUTO = "auto"  # of `packed`: a file in the user's cache directory
_ROOM = 3  # times the packed file: free disk for which `--fit` keeps one
_GPU = Path("/dev/nvidiactl")


def preflight(config: EngineConfig) -> Found:
    """The model, whose weights may have to be fetched.

    Raises OSError or ValueError for a model that cannot be served, or not in the memory of this machine.
    """
    model = find_model(config.model)
    if not model.absent and any(model.path.glob("*.safetensors*")):
        Checkpoint.open(model.path)
    if config.check_memory and _on_this_cpu(config):
        _check_memory(config, model.path)
    return model


def with_fit(config: EngineConfig, path: Path) -> EngineConfig:
    """The configuration with what `--fit` chooses for the fields that have their defaults; logs it.

    Raises ValueError if nothing fits.
    """
    if not _on_this_cpu(config) or config.num_ranks > 1:
        log.info("fit: chooses for one rank on a CPU; the options stay as they are")
        return config
    found = fit(path, available_memory(), config.quantization)
    log.info("fit: %s", found)
    chosen: dict[str, Any] = {}
    if config.packed in (None, AUTO):
        chosen["quantization"] = found.quantization
    room = shutil.disk_usage(_existing(cache_dir())).free > _ROOM * found.weights
    if config.packed is None and room and not (path / INDEX).is_file():  # GGUF is nearly packed already
        chosen["packed"] = AUTO
    if config.kv_cache_memory is None and config.num_blocks is None:
        chosen |= {"kv_cache_memory": found.kv_cache_memory}
        chosen |= {"max_model_len": found.max_model_len} if config.max_model_len is None else {}
    if config.max_num_seqs == EngineConfig().max_num_seqs:
        chosen["max_num_seqs"] = found.max_num_seqs
    return replace(config, **chosen)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def with_packed(config: EngineConfig, path: Path, progress: Progress | None = unseen) -> EngineConfig:
    """The configuration with the packed file that `--packed auto`, the default of the embedded model, means;
    without one where packed weights cannot serve. progress: of writing a missing file; None leaves it."""
    wanted = config.packed == AUTO or (config.packed is None and config.model == EMBEDDED)
    if not wanted:
        return config
    if config.deterministic or config.num_ranks > 1 or not (_on_this_cpu(config) and _packs(config.backend)):
        return replace(config, packed=None)
    if progress is None:
        file = _cached_file(path, config.quantization)
        return replace(config, packed=str(file)) if file.is_file() else config
    written = _pack_once(path, config.quantization, config.threads, progress)
    return replace(config, packed=None if written is None else str(written))


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
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            pack_checkpoint(path, file, quantization, threads, progress)
            for other in set(file.parent.glob(f"{file.stem[:-8]}*.packed")) - {file}:
                other.unlink(missing_ok=True)
    except (OSError, RuntimeError, BeingWritten) as error:
        log.info("%s is not packed for the next start: %s", path, error)
        return None
    return file


def _packs(backend: str) -> bool:
    """Whether a backend's weights are packed."""
    return backend.partition("/")[0] in ("auto", "cpu") and find_spec("farthing._native") is not None


def _on_this_cpu(config: EngineConfig) -> bool:
    """Whether weights and cache are in this machine's memory."""
    if config.nodes > 1 or config.experts_on is not None or config.device not in (None, "cpu"):
        return False
    kind = config.backend.partition("/")[0]
    return kind in ("cpu", "reference") or (kind == "auto" and not _GPU.exists())


def _check_memory(config: EngineConfig, path: Path) -> None:
    free, cache = available_memory(), config.kv_cache_memory or 0
    if cache > free:
        raise ValueError(
            f"kv_cache_memory: got {gigabytes(cache)}; expected at most the {gigabytes(free)} that are "
            "available, or --no-check-memory"
        )
    if config.packed is not None:  # mapped: what does not fit is read again
        return

    if certainly_fits(path, free - cache):
        return
    sizes = config.tensor_parallel_size, config.pipeline_parallel_size, config.expert_parallel_size

    def needed(quantization: str | None) -> int:
        return weight_bytes(path, quantization, sizes) + cache

    if (wanted := needed(config.quantization)) <= free:
        return
    smaller = ("int8", "int4") if config.quantization is None else ()
    fitting = next((f"--quantization {kind}, " for kind in smaller if needed(kind) <= free), "")
    raise ValueError(
        f"model: {config.model} needs {gigabytes(wanted)} for weights{' and cache' if cache else ''}, and "
        f"{gigabytes(free)} are available; expected {fitting}a smaller model, or --no-check-memory"
    )
