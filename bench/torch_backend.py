"""The torch backend compared with the reference ops it replaces, on this machine's CPU.

    python bench/torch_backend.py [--model mite] [--rounds 7]

One process holds an engine for each. Rounds alternate between them; greedy, without prefix cache. Prints the
median time of prompts and of decode steps, and whether both produced the same tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading

from farthing import LLM, SamplingParams
from farthing.ops.torch_backend import COMPILER

BACKENDS = ("reference", "torch/cpu")
CASES = ((1, 256, 32), (1, 1024, 8), (8, 256, 12))  # sequences, prompt tokens, output tokens
Round = tuple[float, float, list[list[int]]]  # seconds to the last first token, seconds per step, tokens


def timed(llm: LLM, prompts: list[list[int]], tokens: int) -> Round:
    """One batch."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    outputs = llm.generate(prompts, [params] * len(prompts), use_tqdm=False)
    arrived = min(o.metrics.arrival_time for o in outputs)
    first = max(o.metrics.first_token_time or 0.0 for o in outputs)
    end = max(o.metrics.finished_time or 0.0 for o in outputs)
    return first - arrived, (end - first) / (tokens - 1), [list(o.outputs[0].token_ids) for o in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mite")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    engines = {
        b: LLM(given.model, backend=b, dtype=given.dtype, enable_prefix_caching=False) for b in BACKENDS
    }
    numbers = random.Random(0)
    timed(engines["torch/cpu"], [[5, 6, 7]], 64)
    for thread in threading.enumerate():
        if thread.name == COMPILER:
            thread.join()
    for sequences, length, tokens in CASES:
        prompts = [[numbers.randrange(3, 4000) for _ in range(length)] for _ in range(sequences)]
        found: dict[str, list[Round]] = {b: [] for b in BACKENDS}
        for number in range(given.rounds + 1):
            for backend, llm in engines.items():
                result = timed(llm, prompts, tokens)
                if number:  # the first round is not counted
                    found[backend].append(result)
        times = {b: [statistics.median(r[i] for r in found[b]) for i in (0, 1)] for b in BACKENDS}
        ratios = [a / b for a, b in zip(*(times[b] for b in BACKENDS), strict=True)]
        same = "same tokens" if found[BACKENDS[0]][0][2] == found[BACKENDS[1]][0][2] else "other tokens"
        print(f"{sequences} x {length} tokens, {given.rounds} rounds, {same}:")
        for name, i in (("prompt", 0), ("step", 1)):
            old, new = (times[b][i] * 1e3 for b in BACKENDS)
            print(f"  {name}: {old:.1f} -> {new:.1f} ms, {ratios[i]:.2f}x")


if __name__ == "__main__":
    main()
