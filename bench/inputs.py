"""What rounding the inputs of integer matrices costs, and what not rounding them does (`--compute`).

    python bench/inputs.py MODEL … [--tokens 8192] [--rounds 3] [--quantization int8] [--json]

Every row is one way of the CPU kernels, with a float32 cache, against the reference ops in float32 on the
same weights: KL divergence and perplexity on this documentation in windows of 512 tokens; and of 200 chats,
how many greedy answers of 32 tokens are the same, and how many first tokens. Speeds are those of
`farthing.LLM` with its default cache; rounds alternate between the rows, and figures are medians with their
spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from decode import generating
from farthing import LLM, SamplingParams
from farthing.compress.evaluate import Corpus, compare_with, load_corpus, remember
from farthing.files import to_json
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.load import load
from farthing.ops.select import select
from limits import Point
from peers import by_generating

ROOT = Path(__file__).parents[1]
WAYS = ("int8", "exact")
ANSWER = 32  # tokens
WINDOW = 512
POINTS = (Point("decode", 1, 128), Point("decode", 8, 128), Point("prefill", 1, 512))
CAPITALS = (
    "France", "Japan", "Italy", "Egypt", "Canada", "Peru", "Norway", "India", "Kenya", "Spain", "Greece",
    "Cuba", "Chile", "Poland", "Turkey", "Nepal", "Ghana", "Iran", "Austria", "Ireland",
)  # fmt: skip
MANNERS = ("", "Answer in one sentence. ", "Be brief: ", "I am ten years old. ", "Reply as a list. ")


def conversations() -> list[list[dict[str, str]]]:
    """200 chats of one question each."""
    asked = json.loads((ROOT / "bench" / "chat_questions.json").read_text())
    questions = [f"What is the capital of {country}?" for country in CAPITALS]
    questions += [manner + q for manner in MANNERS for q in (*asked["heldout"], *asked["calibration"])]
    return [[{"role": "user", "content": text}] for text in questions]


def documentation(work: Path, model: Path, tokens: int) -> Corpus:
    """Windows of this documentation."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))]
    data = work / "documentation.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in pages))
    return load_corpus(data, model, ModelConfig.from_directory(model), WINDOW, tokens)


def answers(model: str, options: dict[str, Any]) -> list[list[int]]:
    """Greedy tokens of every conversation."""
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    with LLM(model, dtype="float32", max_num_seqs=32, max_model_len=512, **options) as llm:
        return [list(o.outputs[0].token_ids) for o in llm.chat(conversations(), params, use_tqdm=False)]


def quality(model: str, tokens: int, quantization: Any) -> dict[str, dict[str, Any]]:
    """Of each way: what `Comparison` has, and how many answers are those of the reference."""
    path, rows = resolve_model(model), {}
    exact = load(path, select("reference", torch.float32, quantization=quantization))
    expected = answers(model, {"backend": "reference", "quantization": quantization})
    with TemporaryDirectory() as work, torch.inference_mode():
        corpus = documentation(Path(work), path, tokens)
        baseline = remember(exact, corpus)
        for way in WAYS:
            options = {"quantization": quantization, "compute": way}
            found = load(path, select("cpu", torch.float32, **options))  # type: ignore[arg-type]
            rows[way] = compare_with(baseline, remember(found, corpus), corpus).to_json()
            texts = answers(model, {"backend": "cpu"} | options)
            pairs = list(zip(texts, expected, strict=True))
            rows[way] |= {
                "chats": len(pairs),
                "same_answers": sum(a == b for a, b in pairs),
                "same_first_tokens": sum(a[0] == b[0] for a, b in pairs),
            }
            print(to_json({"model": model, "compute": way} | rows[way]), file=sys.stderr, flush=True)
    return rows


def speeds(model: str, rounds: int, quantization: Any) -> dict[str, dict[str, list[float]]]:
    """Of each way: tokens/s at every point, round by round."""
    measures = {}
    for way in WAYS:
        llm = LLM(
            model, backend="cpu", compute=way, quantization=quantization, skip_tokenizer_init=True,
            max_model_len=1024, max_num_seqs=8, kv_cache_memory=1 << 30,
        )  # fmt: skip
        measures[way] = by_generating(generating(llm, {128}, 20000))
    found: dict[str, dict[str, list[float]]] = {way: {str(p): [] for p in POINTS} for way in WAYS}
    for turn in range(rounds):
        for point in POINTS:
            for way in WAYS if turn % 2 else reversed(WAYS):
                found[way][str(point)].append(measures[way](point) or 0.0)
    return found


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, a row per model and way."""
    names = [f"{p}, tokens/s" for p in POINTS]
    yield f"| model | compute | KL, nats | perplexity | same answers | first tokens | {' | '.join(names)} |"
    yield "|---" * (6 + len(names)) + "|"
    for row in rows:
        rates = [
            f"{statistics.median(r):.0f} ({min(r):.0f}–{max(r):.0f})" for r in row["speeds"].values() if r
        ]
        name, grown = Path(row["model"]).name, row["relative_increase"]
        yield (
            f"| {name} | {row['compute']} | {row['kl']:.6f} | {grown:+.3%} "
            f"| {row['same_answers']} of {row['chats']} | {row['same_first_tokens']} | {' | '.join(rates)} |"
        )


def main() -> None:
    """Print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=8192, help="of the documentation")
    parser.add_argument("--rounds", type=int, default=5, help="of speed; 0: none")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for model in given.models:
        timed = speeds(model, given.rounds, given.quantization) if given.rounds else {w: {} for w in WAYS}
        for way, found in quality(model, given.tokens, given.quantization).items():
            rows.append({"model": model, "compute": way, "speeds": timed[way], **found})
    print(to_json(rows) if given.json else "\n".join(table(rows)))


if __name__ == "__main__":
    main()
