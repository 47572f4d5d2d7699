"""Speed and memory of a compressed model on this machine, compared with its source."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farthing.compress.evaluate import BLOCK, paged_batch
from farthing.model import DecoderModel, load
from farthing.model.pack import pack_checkpoint
from farthing.ops import LatentCache, make_batch, select

STEPS = 24
PROMPT = 256
PREFILLS = 5
ROUND = 8  # decode steps of one model before switching to the next


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one sequence."""

    prefill: float
    decode: float


def serving_figures(source: Path) -> Callable[[Path], list[dict[str, Any]]]:
    """A function of OUT for `api.compress(after=…)`: size, memory and decode speed of both models."""

    def rows(out: Path) -> list[dict[str, Any]]:
        backend = select("auto").name
        models = {"source": load(source, select("auto")), "compressed": load(out, select("auto"))}
        speed = speeds(models)
        paths = {"source": source, "compressed": out}
        size = {name: _size(path) for name, path in paths.items()}
        resident = {name: resident_bytes(path) for name, path in paths.items()}
        return [
            {
                "model": name,
                "bytes": size[name],
                "memory": resident[name],
                "prefill_tokens_per_second": round(speed[name].prefill, 2),
                "decode_tokens_per_second": round(speed[name].decode, 2),
                "backend": backend,
            }
            for name in models
        ]

    return rows


def resident_bytes(path: Path) -> int | None:
    """Memory that a separate process needs for the loaded model, beyond the program itself.

    None if the system does not report it (no /proc).
    """
    if not Path("/proc/self/status").is_file():
        return None
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(result.stdout)


_MEASURE = """
import sys
from pathlib import Path
from farthing.model import load
from farthing.ops import select

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

ops = select("auto")
before = anonymous()
model = load(Path(sys.argv[1]), ops)
print(anonymous() - before)
"""


def speeds(models: dict[str, DecoderModel], steps: int = STEPS) -> dict[str, Speed]:
    """Speeds of one sequence on the engine's kernels, interleaved so that noise affects all models alike."""
    caches = {name: _cache(model, steps) for name, model in models.items()}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(PREFILLS):
        for name, model in models.items():
            prompt = _prompt(model, steps)
            batch, _ = paged_batch([prompt])
            ids = torch.arange(prompt) % model.config.vocab_size
            start = time.perf_counter()
            model.forward(ids, batch, caches[name])
            prefill[name].append((time.perf_counter() - start) / prompt)
    for first in range(0, steps, ROUND):
        for name, model in models.items():
            took = _decode(model, caches[name], _prompt(model, steps) + first, min(ROUND, steps - first))
            decode[name] += took[1:] or took  # the first step refills the CPU caches
    return {
        name: Speed(1 / statistics.median(prefill[name]), 1 / statistics.median(decode[name]))
        for name in models
    }


def _decode(model: DecoderModel, cache: LatentCache, position: int, steps: int) -> list[float]:
    """Seconds of each of `steps` steps of one sequence with `position` tokens."""
    took = []
    for step in range(steps):
        batch = make_batch([1], [position + step], [range(cache.num_blocks)], BLOCK)
        start = time.perf_counter()
        model.logits(model.forward(torch.tensor([step % model.config.vocab_size]), batch, cache))
        took.append(time.perf_counter() - start)
    return took


def _prompt(model: DecoderModel, steps: int) -> int:
    return min(PROMPT, model.config.max_position_embeddings - steps - 1)


def _cache(model: DecoderModel, steps: int) -> LatentCache:
    blocks = -(-(_prompt(model, steps) + steps + 1) // BLOCK)
    return model.new_cache(blocks, BLOCK, "float32" if model.ops.dtype == torch.float32 else "bfloat16")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def pack_for_cpu(out: Path) -> Path:
    """Write OUT/packed.bin, the CPU kernels' layout, which a replica only needs to map."""
    target = out / "packed.bin"
    pack_checkpoint(out, target)
    return target
