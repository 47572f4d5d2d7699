"""Measures the memory of a rank's process for one full step.

Runs as a process that reads one measurement per line (JSON) and answers with its bytes. Each is taken in a
fork, so that libraries are imported once and no measurement sees the memory of another.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farthing.model.config import ModelConfig
from farthing.model.load import model_of
from farthing.model.parameters import random_parameters
from farthing.model.source import MemorySource
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.parallel import rank as rank_module
from farthing.parallel.collectives import Alone
from farthing.parallel.plan import Layout
from farthing.parallel.rank import Rank

_PR_SET_THP_DISABLE = 41


def own_memory(what: str) -> int:
    """Bytes of VmRSS (current) or VmHWM (peak) without the pages of files.

    The kernel drops pages of libraries when other processes need memory, which would hide as much growth.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.partition(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return (int(kilobytes[what]) - int(kilobytes["RssFile"])) * 1024


def growth(work: Callable[[], object]) -> int:
    """The most bytes by which the process grew while it did `work`."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = own_memory("VmRSS")
    work()
    return own_memory("VmHWM") - before


class Silent(Alone):
    """A group whose other ranks send zeros."""

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return x.zero_()


def measure(
    raw: dict[str, Any],
    layout: Layout,
    backend: str,
    quantization: str | None,
    tokens: int,
    rank: int = 0,
    halves: int | None = None,
) -> int:
    """Growth of a rank's memory in bytes while it computes `tokens` of one sequence. halves: as `select`'s
    `parts`."""
    # No huge pages: the warm-up step would touch whole ones, which would then not be counted.
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    rank_module.DistGroup = lambda ranks, timeout: Silent()  # type: ignore[assignment,misc]
    config = ModelConfig.from_json(raw)
    source = MemorySource(random_parameters(config))
    compute = "int8" if backend == "cpu" else "auto"
    ops = select(backend, torch.float32, 1, quantization, parts=halves, compute=compute)  # type: ignore[arg-type]
    # One rank has no groups: the engine drives the model itself.
    alone = layout.world == 1
    model: Any = model_of(config, ops, source) if alone else Rank(config, source, layout, rank, ops)
    blocks = list(range(tokens // 16 + 1))
    cache = model.new_cache(len(blocks), 16, "bfloat16")
    cache.data.zero_()  # its pages are not buffers

    def run(count: int) -> None:
        ids, batch = (
            torch.arange(count) % (config.vocab_size // layout.world),
            make_batch([count], [0], [blocks], 16),
        )
        with torch.inference_mode():
            if alone:
                model.top_logits(model.forward(ids, batch, cache)[-1:], 1)
            else:
                hidden = model.forward(ids, batch)[-1:]
                model.top_logits(1, 1, hidden=hidden if model.last else hidden[:, : config.hidden_size])

    run(4)  # libraries and threads are loaded
    return growth(lambda: run(tokens))


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        asked["layout"] = Layout(*asked["layout"])
        if (child := os.fork()) == 0:
            try:
                print(measure(**asked), flush=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"failed: {line}")
