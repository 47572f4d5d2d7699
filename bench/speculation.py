"""Tokens per second with and without drafts, on the model's held-out Python.

    python bench/speculation.py [--model mite] [--batch 1] [--methods mtp:1 mtp:2 ngram:4]
    python bench/speculation.py --grid [--methods mtp+ngram]

All engines are built first and run over the same prompts in rounds whose order alternates; two rounds come
first that do not count. A round's speed runs from the first token of an answer to the last, and the speed-up
is the median over rounds of the speed divided by that without drafts in the same round. `control` is a second
engine without drafts: how far it is from 1 is the noise. The limit is the speed-up if drafts and their
verification were free: the mean number of tokens per step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from farthing import LLM, SamplingParams
from farthing.config import Quantization
from farthing.engine.speculation import Gate
from farthing.hub import resolve_model

UNCOUNTED = 2  # rounds in which engines warm up and measure their drafts


@dataclass(frozen=True)
class Work:
    """What every engine does in one round."""

    batch: int
    temperature: float
    repetitive: bool


@dataclass
class Result:
    """One engine: a figure per round, and its answers."""

    speeds: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    def over(self, base: Result) -> float:
        """Median speed-up."""
        return statistics.median(a / b for a, b in zip(self.speeds, base.speeds, strict=True))


def prompts_of(model: str, count: int, length: int, llm: LLM, repetitive: bool = False) -> list[list[int]]:
    """The beginnings of held-out files.

    repetitive: four fifths of the length, of which the first quarter follows once more, so that the
    continuation is in the prompt, as when a model edits code.
    """
    lines = (resolve_model(model) / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    ids = [llm.get_tokenizer().encode(text) for text in texts]
    long = [tokens[:length] for tokens in ids if len(tokens) >= length]
    chosen = [long[i % len(long)] for i in range(count)]
    if not repetitive:
        return chosen
    body = 4 * length // 5
    return [tokens[:body] + tokens[: length - body] for tokens in chosen]


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
    parser.add_argument("--prompt", type=int, default=160, help="tokens of each prompt")
    parser.add_argument("--repetitive", action="store_true", help="prompts that contain their continuation")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--methods", nargs="*", default=["mtp+ngram"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--force", action="store_true", help="draft in every step, to measure acceptance")
    parser.add_argument("--grid", action="store_true", help="batch 1, 4, 16, temperature 0, 0.8, both texts")
    return parser.parse_args()


def build(args: argparse.Namespace, batch: int) -> dict[str, LLM]:
    """One engine per method, one without drafts, and its control."""
    engines = {
        name: LLM(
            Path(args.model) if Path(args.model).is_dir() else args.model,
            backend=args.backend,
            quantization=cast("Quantization | None", args.quantization),
            speculate=method,
            threads=args.threads,
            max_num_seqs=max(8, batch),
            enable_prefix_caching=False,
        )
        for name, method in [("none", None), *((m, m) for m in args.methods), ("control", None)]
    }
    if args.force:
        for llm in engines.values():
            force(llm)
    return engines


def run(engines: dict[str, LLM], work: Work, args: argparse.Namespace) -> dict[str, Result]:
    """Interleaved rounds."""
    count = work.batch * (args.rounds + UNCOUNTED)
    prompts = prompts_of(args.model, count, args.prompt, engines["none"], work.repetitive)
    params = [
        SamplingParams(temperature=work.temperature, seed=i, max_tokens=args.tokens, ignore_eos=True)
        for i in range(work.batch)
    ]
    results = {name: Result() for name in engines}
    for r in range(args.rounds + UNCOUNTED):
        for name, llm in list(engines.items())[:: -1 if r % 2 else 1]:
            outputs = llm.generate(prompts[r * work.batch :][: work.batch], params, use_tqdm=False)
            began = min(o.metrics.first_token_time for o in outputs)
            ended = max(o.metrics.finished_time for o in outputs)
            if r >= UNCOUNTED:
                results[name].speeds.append(work.batch * (args.tokens - 1) / (ended - began))
            results[name].answers += [o.outputs[0].token_ids for o in outputs]
    return results


def single(engines: dict[str, LLM], args: argparse.Namespace) -> None:
    """One work, with acceptance."""
    results = run(engines, Work(args.batch, args.temperature, args.repetitive), args)
    base = results["none"]
    print(
        f"{'drafts':<10}{'tokens/s':>10}{'speed-up':>10}{'accepted':>10}{'drafted':>9}{'limit':>8}{'same':>7}"
    )
    for name, result in results.items():
        s = engines[name].engine.stats.snapshot()
        decoded = s.generation_tokens - len(result.answers)
        rate = s.accepted_tokens / s.draft_tokens if s.draft_tokens else 0.0
        same = sum(a == b for a, b in zip(result.answers, base.answers, strict=True)) / len(result.answers)
        limit = decoded / (decoded - s.accepted_tokens)
        print(
            f"{name:<10}{statistics.median(result.speeds):>10.0f}{result.over(base):>10.2f}{rate:>10.1%}"
            f"{s.draft_tokens:>9}{limit:>8.2f}{same:>7.0%}"
        )


def grid(engines: dict[str, LLM], args: argparse.Namespace) -> None:
    """Speed-ups of all cells, the control's in brackets."""
    for batch, temperature, repetitive in itertools.product((1, 4, 16), (0.0, 0.8), (False, True)):
        results = run(engines, Work(batch, temperature, repetitive), args)
        base = results.pop("none")
        noise = results.pop("control").over(base)
        cells = "  ".join(f"{name} {result.over(base):.2f}" for name, result in results.items())
        same = all(result.answers == base.answers for result in results.values())
        text = "repetitive" if repetitive else "fresh"
        print(f"batch {batch:<3} T {temperature:<4} {text:<11} {cells}  (control {noise:.2f}; same: {same})")


def main() -> None:
    args = parse()
    engines = build(args, 16 if args.grid else args.batch)
    print(f"model {args.model}, {engines['none'].engine.backend}, {args.rounds} rounds")
    (grid if args.grid else single)(engines, args)
    for llm in engines.values():
        llm.close()


if __name__ == "__main__":
    main()
