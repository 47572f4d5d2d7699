"""The cost of a long context with DeepSeek sparse attention: a random slice of V3.2 with its real head sizes.

    python bench/long_context.py [--threads 2] [--repeats 9] [--context 32768] [--prefill [PAST ...]]
                                 [--peer PATH/llama-server --folder DIR]

Two layers (one dense, one mixture of experts), 4-bit weights, bfloat16 cache. The variants are interleaved
and compared pairwise, so that another process on the machine slows them equally; absolute times are not
comparable between machines. The cache is filled with random latents and index keys: prefilling it would take
longer than the whole measurement, and the cost of attention does not depend on the values.

With --peer, ik_llama.cpp computes the same slice in the same rounds (`pip install gguf` first). The first run
writes the slice in its format to DIR and prefills the whole context, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.ops.api import Batch, LatentCache
from farthing.ops.cpu import CpuOps
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight
from farthing.planner.estimate import published_config

BLOCK = 16


class RandomSource:
    """Weights of plausible scale, generated on request, so that only one is in memory."""

    def has(self, name: str) -> bool:
        return True

    def holds(self, module: str) -> bool:
        return True

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        assert shape is not None
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        noise = torch.randn(shape, generator=generator)
        return torch.ones(shape) if "norm.weight" in name else noise * shape[-1] ** -0.5

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        return Weight("dense", self.tensor(f"{module}.weight", shape).bfloat16())


def slice_of_v32(experts: int) -> ModelConfig:
    """One dense and one sparse layer with fewer experts and a small vocabulary; without YaRN and with
    GLM-5's rotation of index keys, which ik_llama.cpp implements and which cost the same."""
    raw = published_config("deepseek-v3.2")
    assert raw is not None
    del raw["rope_scaling"]
    smaller: dict[str, Any] = dict(
        num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0, vocab_size=1024,
        n_routed_experts=experts, n_group=1, topk_group=1, model_type="glm_moe_dsa",
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


def cached(model: DecoderModel, context: int) -> tuple[LatentCache, list[list[int]]]:
    """A cache with random contents and one sequence's scattered blocks."""
    blocks = -(-context // BLOCK)
    cache = model.new_cache(blocks, BLOCK, "bfloat16")
    for tensor in cache.tensors():
        for layer in tensor:
            layer.copy_(torch.randn(layer.shape).mul_(0.5))
    return cache, [torch.randperm(blocks).tolist()]


def timed(
    model: DecoderModel, clock: Timed, step: Tensor, batch: Batch, cache: LatentCache
) -> tuple[float, float]:
    """(seconds of the step, seconds in attention)."""
    clock.seconds, start = 0.0, time.perf_counter()
    with torch.inference_mode():
        model.run_layers(step, batch, cache)
    return time.perf_counter() - start, clock.seconds


Steps = dict[str, tuple[str, int]]  # variant -> (model, tokens already cached)
Times = dict[str, list[tuple[float, float]]]  # variant -> (seconds of a step, seconds in attention)


def measure(
    models: dict[str, DecoderModel], clock: Timed, tokens: int, at: Steps, repeats: int, peer: Any = None
) -> Times:
    """Times of every variant, interleaved; those of a peer have its name before the variant's."""
    config = next(iter(models.values())).config
    caches = {name: cached(model, max(n for _, n in at.values()) + tokens) for name, model in models.items()}
    steps = {}
    for way, (name, past) in at.items():
        batch = make_batch([tokens], [past], caches[name][1], BLOCK)
        steps[way] = name, torch.randn(tokens, config.hidden_size), batch
    found: Times = {}
    warmup = int(tokens == 1)  # chunks take seconds, which hides the first round's page faults
    for turn in range(-warmup, repeats):
        for way, (name, hidden, batch) in steps.items():
            times = timed(models[name], clock, hidden.clone(), batch, caches[name][0])
            if turn >= 0:
                found.setdefault(way, []).append(times)
            if peer is not None:
                seconds = peer.step(*at[way], tokens)
                if turn >= 0:
                    found.setdefault(f"peer {way}", []).append((seconds, 0.0))
    return found


def ratio(found: Times, over: str, under: str, part: int = 0) -> float:
    """Median of the paired ratios; part 0: the whole step, 1: attention."""
    return statistics.median(a[part] / b[part] for a, b in zip(found[over], found[under], strict=True))


def summary(found: Times) -> dict[str, Any]:
    """Median milliseconds of every variant, and how many times longer the peer takes."""
    return {
        "milliseconds": {way: 1e3 * statistics.median(t for t, _ in times) for way, times in found.items()},
        "peer_over_ours": {way: ratio(found, f"peer {way}", way) for way in found if f"peer {way}" in found},
    }


def built(experts: int, ops: CpuOps) -> dict[str, DecoderModel]:
    """The slice, with sparse attention and, with the same packed weights, with dense attention."""
    sparse = DecoderModel(slice_of_v32(experts), ops, RandomSource())
    dense = object.__new__(DecoderModel)
    dense.__dict__.update(sparse.__dict__)
    dense.config = sparse.config.selecting(None)
    dense.layers = [(_without_indexer(attention), feed) for attention, feed in sparse.layers]
    return {"sparse": sparse, "dense": dense}


def _without_indexer(attention: Any) -> Any:
    copied = object.__new__(type(attention))
    copied.__dict__.update(attention.__dict__)
    copied.indexer = None
    return copied


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prefill chunk")
    parser.add_argument("--no-decode", action="store_true", help="time prefill chunks only")
    parser.add_argument(
        "--prefill", type=int, nargs="*", metavar="PAST",
        help="time a prefill chunk after so many tokens; without numbers, after 8192, 16384 and the most",
    )  # fmt: skip
    parser.add_argument("--peer", type=Path, help="ik_llama.cpp's llama-server")
    parser.add_argument("--peer-flags", default="", help="further options of the peer")
    parser.add_argument("--folder", type=Path, default=Path("long-context"), help="for the peer's files")
    return parser.parse_args()


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    ops = CpuOps(options.threads, quantization="int4")
    clock, far = Timed(ops), options.context
    models = built(options.experts, ops)
    document: dict[str, Any] = {"backend": ops.name, "context": far}
    peer = None
    if options.peer:
        from glm_dsa_peer import Peer

        peer = Peer(
            options.peer, models["sparse"].config, RandomSource(), options.folder, options.threads, far,
            options.peer_flags.split(),
        )  # fmt: skip
    if not options.no_decode:
        at = {
            "sparse, 2048": ("sparse", 2047),
            f"sparse, {far}": ("sparse", far - 1),
            "dense, 2048": ("dense", 2047),
            f"dense, {far}": ("dense", far - 1),
        }
        found = measure(models, clock, 1, at, options.repeats, peer)
        document["decode_over_2048"] = ratio(found, f"sparse, {far}", "sparse, 2048")
        document["dense_attention_over_sparse"] = ratio(found, f"dense, {far}", f"sparse, {far}", 1)
        document["decode"] = summary(found)
    if options.prefill is not None:
        document["prefill"] = {}
        for past in options.prefill or (8192, 16384, far - options.chunk):
            at = {way: (way, past) for way in models}
            found = measure(models, clock, options.chunk, at, max(1, options.repeats // 4), peer)
            ratios = {"dense_over_sparse": ratio(found, "dense", "sparse")}
            document["prefill"][past] = ratios | summary(found)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
