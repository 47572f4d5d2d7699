"""Experts per token against perplexity and tokens/s: adaptive experts on the embedded model.

usage: python bench/adaptive.py [--calibrated DIR] [--picture docs/figures/adaptive-experts.png] [--json]
Every rule is served by the same engine on the same prompts, rules interleaved, medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter

import torch

from farthing import LLM, SamplingParams
from farthing.compress.evaluate import evaluate, halves, load_corpus
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.inspect import routing_report
from farthing.model.load import load
from farthing.ops.select import select

RULES = ("all", "adaptive:0.9", "adaptive:0.8", "adaptive:0.7", "adaptive:0.6", "adaptive:0.5")


def quality(path: Path, rule: str, tokens: int | None) -> tuple[float, float]:
    """(perplexity, experts per token and layer) on the held-out half not used for calibration."""
    model = load(path, select("auto"), rule)
    _, corpus = halves(load_corpus(resolve_model("mite") / "heldout.jsonl", path, model.config, 1024, tokens))
    perplexity = evaluate(model, corpus, with_drafts=False).perplexity
    report = routing_report(model, [w.ids[:-1].tolist() for w in corpus.windows])
    return perplexity, report.experts_per_token


def speeds(paths: dict[str, tuple[Path, str]], rounds: int, batch: int) -> dict[str, float]:
    """Median generated tokens/s of each rule."""
    engines = {name: LLM(str(path), experts=rule, max_num_seqs=batch) for name, (path, rule) in paths.items()}
    prompts = [[0, *torch.randint(300, 8000, (64,)).tolist()] for _ in range(batch)]
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    seen: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, llm in engines.items():
            start = perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            if turn:  # the first round warms up
                seen[name].append(batch * 64 / (perf_counter() - start))
    return {name: statistics.median(values) for name, values in seen.items()}


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mite")
    parser.add_argument(
        "--calibrated", type=Path, help="written by `farthing compress --recipe adaptive-experts`"
    )
    parser.add_argument("--tokens", type=int, help="held-out tokens to use. Default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    path = resolve_model(args.model)
    paths = {rule: (path, rule) for rule in RULES}
    if args.calibrated:
        paths["calibrated"] = (args.calibrated, "auto")
    top_k = ModelConfig.from_directory(path).num_experts_per_tok
    measured = {name: quality(p, rule, args.tokens) for name, (p, rule) in paths.items()}
    rates = speeds(paths, args.rounds, args.batch)
    base = measured["all"][0]
    rows = [
        {
            "rule": name,
            "experts_per_token": experts,
            "routed_flops_saved": 1 - experts / top_k,
            "perplexity": perplexity,
            "perplexity_increase": perplexity / base - 1,
            "tokens_per_second": rates[name],
        }
        for name, (perplexity, experts) in measured.items()
    ]
    if args.picture:
        plot(rows, args.picture)
    if args.json:
        print(json.dumps({"batch": args.batch, "rows": rows}))
        return
    print(
        f"{'rule':>14} {'experts':>8} {'FLOPs saved':>12} {'perplexity':>11} {'increase':>9} {'tokens/s':>9}"
    )
    for r in rows:
        print(
            f"{r['rule']:>14} {r['experts_per_token']:8.2f} {r['routed_flops_saved']:12.1%} "
            f"{r['perplexity']:11.4f} {r['perplexity_increase']:9.2%} {r['tokens_per_second']:9.0f}"
        )


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Perplexity and speed over experts per token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(7, 4))
    x = [r["experts_per_token"] for r in rows]
    left.scatter(x, [100 * r["perplexity_increase"] for r in rows], color="#b91c1c")
    left.axhline(0.5, color="#b91c1c", linestyle=":", linewidth=1)
    left.set_xlabel("experts per token")
    left.set_ylabel("perplexity increase, %", color="#b91c1c")
    right = left.twinx()
    right.scatter(x, [r["tokens_per_second"] for r in rows], color="#1d4ed8", marker="^")
    right.set_ylabel("tokens per second", color="#1d4ed8")
    for r in rows:
        left.annotate(
            str(r["rule"]).removeprefix("adaptive:"), (r["experts_per_token"], 100 * r["perplexity_increase"])
        )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
