"""What a rank's process really takes for one full step, by the kernel's books. A process of its own."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

from farthing.model import ModelConfig
from farthing.model.load import random_parameters
from farthing.model.source import MemorySource
from farthing.ops import make_batch, select
from farthing.parallel import rank as rank_module
from farthing.parallel.group import Alone
from farthing.parallel.plan import Layout
from farthing.parallel.rank import Rank

_PR_SET_THP_DISABLE = 41


def resident(what: str) -> int:
    """VmRSS, or VmHWM: its maximum."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise AssertionError(what)


def measure(raw: dict[str, Any], layout: Layout, backend: str, quantization: str | None, tokens: int) -> int:
    """Bytes that rank 0's memory grows by while it computes `tokens` of one sequence."""
    # No huge pages: the small step before would touch whole ones, and they would not be counted.
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    rank_module.DistGroup = lambda ranks, timeout: Alone()  # type: ignore[assignment,misc]
    config = ModelConfig.from_json(raw)
    source = MemorySource(random_parameters(config))
    ops = select(backend, torch.float32, 1, quantization)  # type: ignore[arg-type]
    rank = Rank(config, source, layout, 0, ops)
    cache = rank.new_cache(tokens // 16 + 1, 16, "bfloat16")
    cache.data.zero_()  # its pages are no buffers
    driven = None if layout.world == 1 else torch.zeros(1, config.hidden_size)

    def run(count: int) -> None:
        batch = make_batch([count], [0], [list(range(tokens // 16 + 1))], 16)
        with torch.inference_mode():
            hidden = rank.forward(torch.arange(count) % (config.vocab_size // layout.world), batch)
            rank.top_logits(1, 1, hidden=hidden[-1:] if driven is None else driven)

    run(4)  # libraries and threads are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the maximum begins anew
    before = resident("VmRSS")
    run(tokens)
    return resident("VmHWM") - before


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(
        measure(
            asked["raw"], Layout(*asked["layout"]), asked["backend"], asked["quantization"], asked["tokens"]
        )
    )
