"""Opens the store described by the engine's configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from farthing.config import EngineConfig
from farthing.engine.disk_cache.index import Index
from farthing.engine.disk_cache.memory import memory_of
from farthing.engine.disk_cache.segment import VERSION, Format
from farthing.engine.disk_cache.store import DiskStore
from farthing.engine.model import Model
from farthing.engine.prefetch import Load
from farthing.engine.stats import DiskStats
from farthing.ops import LatentCache

log = logging.getLogger(__name__)

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # read of each weight file


def open_store(
    config: EngineConfig,
    model: Model,
    cache: LatentCache,
    stats: DiskStats,
    loaded: Callable[[Load[Any], int], None],
) -> DiskStore | None:
    """The store of `prefix_cache_dir`; None without one, or if the directory cannot be used.

    Raises ValueError if the path is not a directory, not even one block fits in the limit, or the model's
    blocks cannot be identified.
    """
    if config.prefix_cache_dir is None:
        return None
    if not model.ops.source:
        raise ValueError(
            f"prefix_cache_dir: got {config.prefix_cache_dir!r} for a model that was not loaded from a "
            "checkpoint; expected a checkpoint, which identifies the blocks"
        )
    memory = memory_of(cache)
    form = Format(identity(config, model, cache), memory.block_bytes)
    if config.prefix_cache_disk_bytes < (least := form.segment_bytes(1)):
        raise ValueError(
            f"prefix_cache_disk_bytes: got {config.prefix_cache_disk_bytes}; expected at least {least}, "
            "the size of a file with one block"
        )
    index = Index(Path(config.prefix_cache_dir), form, config.prefix_cache_disk_bytes)
    return DiskStore(index, memory, config.block_size, stats, loaded) if _list(index) else None


def identity(config: EngineConfig, model: Model, cache: LatentCache) -> bytes:
    """A digest of everything that determines a block's contents besides its tokens and salt."""
    packed = () if config.packed is None else (Path(config.packed),)
    parts = (
        VERSION,
        version("farthing"),
        model.ops.source,
        model.ops.name.partition(",")[0],  # without the number of threads
        *(sample(file) for file in (*model.ops.weight_files, *packed)),
        *(config.dtype, config.quantization, config.experts, config.deterministic),
        *(config.experts_on, config.hot_experts),  # results differ between devices
        "mtp" in (config.speculate or ""),  # only then its layer's rows are filled
        *((str(t.dtype), t.shape[0], *t.shape[2:]) for t in cache.tensors()),
    )
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def sample(file: Path) -> bytes:
    """A digest of a file's size, its modification time, and evenly spaced parts from beginning to end."""
    status = file.stat()
    digest = blake2b(repr((status.st_size, status.st_mtime_ns)).encode(), digest_size=16)
    last = max(0, status.st_size - _SAMPLE_BYTES)
    with file.open("rb", buffering=0) as stream:
        for i in range(_SAMPLES):
            stream.seek(last * i // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()


def _list(index: Index) -> bool:
    """Create and list the directory. Returns False, with a warning, if it is unusable."""
    try:
        index.create()
        index.refresh()
        index.evict()
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"prefix_cache_dir: got {str(index.root)!r}; expected a directory") from None
    except OSError as error:
        if not index.folder.is_dir():
            log.warning("prefix cache: cannot use %s (%s); continuing without it", index.root, error.strerror)
            return False
    log.info(
        "prefix cache: %d blocks in %s, %.1f of %.1f GB used",
        *(len(index), index.folder, index.stored_bytes / 1e9, index.capacity / 1e9),
    )
    return True
