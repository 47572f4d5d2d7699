"""How fast a compressed model decodes here and what memory it takes, beside its source."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from farthing.compress.evaluate import BLOCK, paged_batch
from farthing.model import DeepseekModel, load
from farthing.ops import make_batch, select

STEPS = 24
PROMPT = 64


def serving_figures(source: Path) -> Callable[[Path], list[dict[str, Any]]]:
    """A function of OUT for `api.compress(after=…)`: size, memory and decode speed of both models."""

    def rows(out: Path) -> list[dict[str, Any]]:
        backend = select("auto").name
        models = {"source": load(source, select("auto")), "compressed": load(out, select("auto"))}
        seconds = decode_seconds(models)
        paths = {"source": source, "compressed": out}
        size = {name: _size(path) for name, path in paths.items()}
        resident = {name: resident_bytes(path) for name, path in paths.items()}
        return [
            {
                "model": name,
                "bytes": size[name],
                "memory": resident[name],
                "decode_tokens_per_second": round(1 / seconds[name], 2),
                "backend": backend,
            }
            for name in models
        ]

    return rows


def resident_bytes(path: Path) -> int | None:
    """Memory a process of its own takes for the loaded model, beyond what the program takes without one.

    None where the system does not tell (no /proc).
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


def decode_seconds(models: dict[str, DeepseekModel], steps: int = STEPS) -> dict[str, float]:
    """Median seconds of a decode step of one sequence; the models take turns, so noise hits all alike."""
    states = {name: _prefill(model, steps) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps):
        for name, model in models.items():
            cache = states[name]
            batch = make_batch([1], [PROMPT + step], [range(cache.num_blocks)], BLOCK)
            start = time.perf_counter()
            model.logits(model.forward(torch.tensor([step % model.config.vocab_size]), batch, cache))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _prefill(model: DeepseekModel, steps: int) -> Any:
    prompt = min(PROMPT, model.config.max_position_embeddings - steps - 1)
    blocks = -(-(PROMPT + steps + 1) // BLOCK)
    cache = model.new_cache(blocks, BLOCK, "float32" if model.ops.dtype == torch.float32 else "bfloat16")
    batch, _ = paged_batch([prompt])
    model.forward(torch.arange(prompt) % model.config.vocab_size, batch, cache)
    return cache


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def pack_for_cpu(out: Path) -> Path:
    """Write OUT/packed.bin, the CPU kernels' own layout, so that a replica starts by mapping it."""
    target = out / "packed.bin"
    model = load(out, select("cpu"))
    model.ops.save_packed(str(target))
    return target
