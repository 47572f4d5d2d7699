"""Decoding requests mixed with a stream of long prompts: inter-token latency and prompt throughput.

    python bench/mixed.py --model S576 --max-step-ms 0 150 --rounds 3

Settings are interleaved round by round, all in one process. Inter-token latencies are those of the
decoding requests only, in milliseconds. The last columns are ratios to the first setting.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

from farthing.config import EngineConfig
from farthing.engine.build import build_engine
from farthing.engine.engine import Engine
from farthing.engine.request import SamplingParams
from random_model import make_model


def measure(
    engine: Engine, decoders: int, prompt: int, seconds: float, seed: int
) -> tuple[list[float], float]:
    """(inter-token latencies in ms, prompt tokens per second) under back-to-back prompts."""
    tokens = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0, detokenize=False)
    done, gaps = threading.Event(), []

    def follow(number: int) -> None:
        stream = engine.submit([seed % 89 + number + 1] * 32, tokens)
        last = 0.0
        for _ in stream:
            now = time.perf_counter()
            if last and started.is_set():
                gaps.append((now - last) * 1e3)
            last = now
            if done.is_set():
                break
        stream.cancel()

    started = threading.Event()
    threads = [threading.Thread(target=follow, args=(i,)) for i in range(decoders)]
    for thread in threads:
        thread.start()
    while engine.stats.snapshot().num_requests_running < decoders:
        time.sleep(0.01)
    started.set()
    before, began, number = engine.stats.snapshot().prompt_tokens, time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        ids = [(7 * number + 13 * i + seed) % 8000 + 1 for i in range(prompt)]
        engine.submit(ids, SamplingParams(max_tokens=1, temperature=0), kind="final").result()
        number += 1
    elapsed = time.perf_counter() - began
    computed = engine.stats.snapshot().prompt_tokens - before
    done.set()
    for thread in threads:
        thread.join()
    return gaps, computed / elapsed


def main() -> None:
    """Print one row per setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="S576", help="a size of bench/random_model.py or a directory")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "farthing-models")
    parser.add_argument("--max-step-ms", type=float, nargs="+", default=[0.0, 150.0])
    parser.add_argument("--decoders", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--packed", metavar="FILE", help="the model's packed file; default: int4 at load")
    args = parser.parse_args()
    path = Path(args.model) if Path(args.model).is_dir() else make_model(args.model, args.cache)
    gaps: dict[float, list[float]] = {limit: [] for limit in args.max_step_ms}
    rates: dict[float, list[float]] = {limit: [] for limit in args.max_step_ms}
    for number in range(args.rounds):
        for limit in args.max_step_ms:
            config = EngineConfig(
                model=str(path), backend="cpu", threads=args.threads, max_model_len=8192, packed=args.packed,
                quantization=None if args.packed else "int4", max_num_seqs=args.decoders + 1,
                max_step_ms=limit, skip_tokenizer_init=True,
            )  # fmt: skip
            with build_engine(config) as engine:
                found, rate = measure(engine, args.decoders, args.prompt, args.seconds, number)
            gaps[limit] += found
            rates[limit].append(rate)
    print(
        f"{'max step, ms':>12} {'ITL p50':>9} {'ITL p99':>9} {'prompt tok/s':>13} {'p99 x':>7} {'tok/s x':>8}"
    )
    base = args.max_step_ms[0]
    for limit in args.max_step_ms:
        p50, p99 = (statistics.quantiles(gaps[limit], n=100)[i] for i in (49, 98))
        first = statistics.quantiles(gaps[base], n=100)[98]
        ratio = statistics.median(a / b for a, b in zip(rates[limit], rates[base], strict=True))
        rate = statistics.median(rates[limit])
        print(f"{limit:>12g} {p50:>12.1f} {p99:>12.1f} {rate:>12.1f} {p99 / first:>12.2f} {ratio:>12.2f}")


if __name__ == "__main__":
    main()
