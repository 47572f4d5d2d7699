"""The engine's cost per step without the model: a stub replaces it and computes nothing.

    python bench/engine_overhead.py

Prints microseconds per decode step by batch size, the median over steps: greedy (the fast path), sampled,
and with drafts; the physical limit is zero. "16 layers of calls" is a 16-layer model on the CPU backend whose
native functions return at once: everything but arithmetic. The target is 1 ms at batch 16.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch

from farthing.config import EngineConfig
from farthing.engine.admission import Admission
from farthing.engine.core import EngineCore
from farthing.engine.drafters import TextDrafter
from farthing.engine.generation import RequestState
from farthing.engine.request import RequestMetrics, RequestStream, SamplingParams
from farthing.engine.runner import Runner
from farthing.engine.scheduler import Scheduler
from farthing.engine.speculation import Gate, Speculator
from farthing.engine.stats import Stats
from farthing.model.config import ModelConfig
from farthing.ops.api import LatentCache
from random_model import config

VOCAB, BLOCKS, BLOCK_SIZE, LENGTH = 8192, 8192, 16, 2048
_BASE = ModelConfig.from_json(config("S"))
_DENSE = tuple(replace(feed, experts=None) for feed in _BASE.feeds)  # no counts of experts are kept


class NoModel:
    """Returns immediately; every token is 7, so that n-gram drafts are always accepted."""

    cache_layers, mtp = 17, ()
    ops = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, tensor=torch.from_numpy, arrays=False,
    )  # fmt: skip
    config = replace(_BASE, feeds=_DENSE, vocab_size=VOCAB, eos_token_ids=())

    def __init__(self) -> None:
        self.hidden = torch.zeros(1024, 8)
        self.answers = torch.zeros(1024, VOCAB)
        self.answers[:, 7] = 50.0
        self.ids = torch.full((1024, 1), 7)

    def forward(self, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.hidden[: len(ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.answers[: len(hidden)]

    def greedy(self, hidden: torch.Tensor) -> list[int]:
        return [7] * len(hidden)

    def top_logits(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n = len(hidden)
        return self.hidden[:n, :1], self.ids[:n], self.hidden[:n, 0]


class Always(Gate):
    """Enables drafts in every step."""

    def order(self, batch: int) -> bool | None:
        return True


class NoArithmetic:
    """The CPU backend's native module with ops that return at once; the likeliest token is 0."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None

    def greedy(self, *arguments: Any) -> list[int]:
        return [0] * arguments[2]

    def top_logits(self, *arguments: Any) -> None:
        tokens, k, ids = arguments[3], arguments[6], arguments[8]
        ctypes.memset(ids, 0, tokens * k * 8)


def calls_only() -> Any:
    """A model of 16 layers that makes every native call of a real one and computes nothing."""
    from farthing.model.load import random_model
    from farthing.ops.cpu import CpuOps

    shape = {
        "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 16, "n_routed_experts": 8, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64,
        "q_lora_rank": 32, "num_attention_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    ops = CpuOps(1)
    model = random_model(ModelConfig.from_json(config("L576") | shape), ops)
    ops._native = NoArithmetic()
    return model


def microseconds_per_step(
    batch: int, params: SamplingParams, drafts: int, steps: int, model: Any = None
) -> float:
    """Median over decode steps with `batch` running sequences of at least 200 tokens."""
    model = cast("Any", model or NoModel())
    cache = LatentCache(torch.zeros(model.cache_layers, BLOCKS, BLOCK_SIZE, 1), None)
    settings = EngineConfig(max_model_len=LENGTH, max_num_seqs=64, max_num_batched_tokens=512)
    scheduler = Scheduler(BLOCKS, BLOCK_SIZE, 64, 512)
    speculator = Speculator([TextDrafter(drafts)], Always) if drafts else None
    core = EngineCore(Runner(model, cache, 64, LENGTH), scheduler, Stats(), None, speculator)
    admission = Admission(settings, cast("ModelConfig", model.config), None)
    for i in range(batch):
        options: dict[str, Any] = {"priority": 0, "cache_salt": str(i), "kind": "delta", "request_id": None}
        request, generations = admission.admit(
            [7] * 200, params, add_special_tokens=False, prompt_text=None, **options
        )
        stream = RequestStream(request, lambda: None)
        state = RequestState(request, stream, RequestMetrics(), generations)
        for generation in generations:
            generation.parent = state
        core.add(state)
    while any(seq.num_output < 2 for seq in scheduler.running) or scheduler.waiting:
        core.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    kinds = {
        "greedy": (SamplingParams(temperature=0, max_tokens=None), 0),
        "greedy, 4 drafts": (SamplingParams(temperature=0, max_tokens=None), 4),
        "temperature": (SamplingParams(seed=1, max_tokens=None), 0),
        "top_p 0.95": (SamplingParams(seed=1, top_p=0.95, max_tokens=None), 0),
    }
    print(f"{'microseconds per step':<20}" + "".join(f"{f'batch {b}':>10}" for b in (1, 4, 16, 64)))
    kinds["16 layers of calls"] = kinds["greedy"]
    for name, (params, drafts) in kinds.items():
        model = calls_only() if name == "16 layers of calls" else None
        cells = [microseconds_per_step(b, params, drafts, steps, model) for b in (1, 4, 16, 64)]
        print(f"{name:<20}" + "".join(f"{c:>10.0f}" for c in cells))


if __name__ == "__main__":
    main()
