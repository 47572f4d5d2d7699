"""The cost of a long context with DeepSeek sparse attention: a random slice of V3.2 with its real head sizes.

    python bench/long_context.py [--threads 2] [--repeats 9] [--context 32768] [--prefill]

Two layers (one dense, one mixture of experts), 4-bit weights, bfloat16 cache. The variants are interleaved
and compared pairwise, so that another process on the machine slows them equally; absolute times are not
comparable between machines. The cache is filled with random latents and index keys: prefilling it would take
longer than the whole measurement, and the cost of attention does not depend on the values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from farthing.model import DeepseekModel, ModelConfig
from farthing.ops import Batch, LatentCache, Weight, make_batch
from farthing.ops.cpu import CpuOps
from farthing.planner.published import published_config

BLOCK = 16


class RandomSource:
    """Weights of plausible scale, generated on request, so that only one is in memory."""

    def has(self, name: str) -> bool:
        return True

    def holds(self, module: str) -> bool:
        return True

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        assert shape is not None
        return torch.ones(shape) if "norm.weight" in name else torch.randn(shape) * shape[-1] ** -0.5

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        return Weight("dense", self.tensor(module, shape).bfloat16())


def slice_of_v32(experts: int) -> ModelConfig:
    """One dense and one sparse layer with fewer experts and a small vocabulary."""
    raw = published_config("deepseek-v3.2")
    assert raw is not None
    smaller: dict[str, Any] = dict(
        num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0, vocab_size=1024,
        n_routed_experts=experts, n_group=1, topk_group=1,
    )  # fmt: skip
    return ModelConfig.from_json(raw | smaller)


class Timed:
    """Seconds spent in attention and its indexer, by replacing two ops of a backend."""

    def __init__(self, ops: CpuOps) -> None:
        self.seconds = 0.0
        for name in ("mla", "index"):
            setattr(ops, name, self._around(getattr(ops, name)))

    def _around(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = op(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return run


def cached(model: DeepseekModel, context: int) -> tuple[LatentCache, list[list[int]]]:
    """A cache with random contents and one sequence's scattered blocks."""
    blocks = -(-context // BLOCK) + 40
    cache = model.new_cache(blocks, BLOCK, "bfloat16")
    for tensor in cache.tensors():
        for layer in tensor:
            layer.copy_(torch.randn(layer.shape).mul_(0.5))
    return cache, [torch.randperm(blocks).tolist()]


def timed(
    model: DeepseekModel, clock: Timed, step: Tensor, batch: Batch, cache: LatentCache
) -> tuple[float, float]:
    """(seconds of the step, seconds in attention)."""
    clock.seconds, start = 0.0, time.perf_counter()
    with torch.inference_mode():
        model.run_layers(step, batch, cache)
    return time.perf_counter() - start, clock.seconds


def measure(
    models: dict[str, DeepseekModel], clock: Timed, tokens: int, at: dict[str, tuple[str, int]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Times of every variant, interleaved. at: variant -> (model, tokens already cached)."""
    config = next(iter(models.values())).config
    caches = {name: cached(model, max(n for _, n in at.values())) for name, model in models.items()}
    steps = {}
    for way, (name, past) in at.items():
        batch = make_batch([tokens], [past], caches[name][1], BLOCK)
        steps[way] = name, torch.randn(tokens, config.hidden_size), batch
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in at}
    for turn in range(repeats + 1):
        for way, (name, hidden, batch) in steps.items():
            times = timed(models[name], clock, hidden.clone(), batch, caches[name][0])
            if turn:  # the first round warms up
                found[way].append(times)
    return found


def ratio(found: dict[str, list[tuple[float, float]]], over: str, under: str, part: int) -> float:
    """Median of the paired ratios; part 0: the whole step, 1: attention."""
    return statistics.median(a[part] / b[part] for a, b in zip(found[over], found[under], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prefill chunk")
    parser.add_argument("--prefill", action="store_true", help="time prefill chunks too")
    options = parser.parse_args()
    torch.manual_seed(0)
    ops = CpuOps(options.threads, quantization="int4")
    clock = Timed(ops)
    sparse = DeepseekModel(slice_of_v32(options.experts), ops, RandomSource())
    dense = object.__new__(DeepseekModel)  # the same packed layers with dense attention
    dense.__dict__.update(sparse.__dict__)
    dense.config = replace(sparse.config, index_topk=None)
    dense.layers = [(_without_indexer(attention), feed) for attention, feed in sparse.layers]
    models = {"sparse": sparse, "dense": dense}
    far = options.context
    at = {
        "sparse, 2048": ("sparse", 2047),
        f"sparse, {far}": ("sparse", far - 1),
        "dense": ("dense", far - 1),
    }
    found = measure(models, clock, 1, at, options.repeats)
    document: dict[str, Any] = {
        "backend": ops.name,
        "context": far,
        "decode_over_2048": ratio(found, f"sparse, {far}", "sparse, 2048", 0),
        "dense_attention_over_sparse": ratio(found, "dense", f"sparse, {far}", 1),
        "milliseconds": {way: 1e3 * statistics.median(t for t, _ in times) for way, times in found.items()},
    }
    if options.prefill:
        chunks = {}
        for past in (8192, 16384, far - options.chunk):
            at = {way: (way, past) for way in models}
            found = measure(models, clock, options.chunk, at, max(1, options.repeats // 4))
            chunks[past] = ratio(found, "dense", "sparse", 0)
        document["dense_prefill_over_sparse"] = chunks
    print(json.dumps(document, indent=1))


def _without_indexer(attention: Any) -> Any:
    copied = object.__new__(type(attention))
    copied.__dict__.update(attention.__dict__)
    copied.indexer = None
    return copied


if __name__ == "__main__":
    main()
