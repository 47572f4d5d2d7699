"""What `farthing serve` finds out before it opens a port, and before it downloads weights."""

from __future__ import annotations

from pathlib import Path

from farthing.checkpoint.reader import Checkpoint
from farthing.config import EngineConfig
from farthing.hub import Found, find_model
from farthing.memory import available_memory, gigabytes
from farthing.planner.fit import certainly_fits, weight_bytes

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
