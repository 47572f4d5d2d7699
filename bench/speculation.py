"""Tokens per second with and without drafts, on the model's held-out Python.

    python bench/speculation.py [--model mite] [--batch 1] [--methods mtp:1 mtp:2 ngram:4]

All engines are built first and run interleaved over the same prompts; medians over rounds, from the first
token of an answer to its last. The limit is the speedup if drafts and their verification were free: the mean
number of tokens per step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import cast

from farthing import LLM, SamplingParams
from farthing.config import Quantization
from farthing.engine.speculation import Gate
from farthing.hub import resolve_model


def prompts_of(model: str, count: int, length: int, llm: LLM, repeat: int = 1) -> list[list[int]]:
    """The beginnings of held-out files; with `repeat`, the first part of each, repeated."""
    lines = (resolve_model(model) / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    ids = [llm.get_tokenizer().encode(text) for text in texts]
    long = [tokens[:length] for tokens in ids if len(tokens) >= length]
    return [(long[i % len(long)][: length // repeat]) * repeat for i in range(count)]


class Free(Gate):
    """Treats every draft as free."""

    def order(self, batch: int) -> bool | None:
        return True

    def price(self, batch: int) -> float:
        return 0.0


def force(llm: LLM) -> None:
    """Enable drafts in every step."""
    speculator = llm.engine._core._speculator
    if speculator is not None:
        speculator.gates = tuple(Free() for _ in speculator.gates)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mite")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of the prompt's first part")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--methods", nargs="*", default=["mtp:1", "mtp:2", "mtp:3", "ngram:4"])
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--force",
        action="store_true",
        help="draft in every step, even if slower, to measure acceptance",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    engines = {
        method or "none": LLM(
            Path(args.model) if Path(args.model).is_dir() else args.model,
            backend=args.backend,
            quantization=cast("Quantization | None", args.quantization),
            speculate=method,
            threads=args.threads,
            max_num_seqs=max(8, args.batch),
            enable_prefix_caching=False,
        )
        for method in (None, *args.methods)
    }
    if args.force:
        for llm in engines.values():
            force(llm)
    print(f"model {args.model}, {engines['none'].engine.backend}, batch {args.batch}")
    prompts = prompts_of(args.model, args.batch * args.rounds, args.prompt, engines["none"], args.repeat)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    answers: dict[str, list[list[int]]] = {name: [] for name in engines}
    params = [
        SamplingParams(temperature=args.temperature, seed=i, max_tokens=args.tokens, ignore_eos=True)
        for i in range(args.batch)
    ]
    for r in range(args.rounds):
        for name, llm in engines.items():
            outputs = llm.generate(prompts[r * args.batch : (r + 1) * args.batch], params, use_tqdm=False)
            began = min(o.metrics.first_token_time for o in outputs)
            ended = max(o.metrics.finished_time for o in outputs)
            speeds[name].append(args.batch * (args.tokens - 1) / (ended - began))
            answers[name] += [o.outputs[0].token_ids for o in outputs]
    base = statistics.median(speeds["none"])
    print(
        f"{'drafts':<10}{'tokens/s':>10}{'speed-up':>10}{'accepted':>10}{'drafted':>9}{'limit':>8}{'same':>7}"
    )
    for name, llm in engines.items():
        s = llm.engine.stats.snapshot()
        speed = statistics.median(speeds[name])
        decoded = s.generation_tokens - args.batch * args.rounds
        rate = s.accepted_tokens / s.draft_tokens if s.draft_tokens else 0.0
        same = sum(a == b for a, b in zip(answers[name], answers["none"], strict=True)) / len(answers[name])
        limit = decoded / (decoded - s.accepted_tokens)
        print(
            f"{name:<10}{speed:>10.0f}{speed / base:>10.2f}{rate:>10.1%}{s.draft_tokens:>9}"
            f"{limit:>8.2f}{same:>7.0%}"
        )
        llm.close()


if __name__ == "__main__":
    main()
