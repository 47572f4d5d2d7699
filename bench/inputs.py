"""What rounding the inputs of integer matrices costs, and what not rounding them does (`--compute`).

    python bench/inputs.py MODEL … [--tokens 8192] [--rounds 5] [--quantization int8] [--json]

Every row is one way of the CPU kernels, with a float32 cache, against the reference ops in float32 on the
same weights: KL divergence and perplexity on this documentation in windows of 512 tokens; and of 200 chats,
how many greedy answers of 32 tokens are the same, and how many first tokens. Speeds are of one thread with a
bfloat16 cache, in seconds of the processor, which other work on the machine changes less than the clock's;
rounds alternate between the rows, and figures are medians, and of each round's ratio to int8.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from farthing import LLM, SamplingParams
from farthing.compress.evaluate import Corpus, compare_with, load_corpus, remember
from farthing.files import to_json
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.load import load
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch

ROOT = Path(__file__).parents[1]
WAYS = ("int8", "exact")
ANSWER = 32  # tokens
WINDOW = 512
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


def decoded(model: DecoderModel, batch: int, steps: int = 12) -> float:
    """Tokens per second of steps with one token of each of `batch` sequences, logits included."""
    cache, ids = model.new_cache(2 * batch, 16, "bfloat16"), torch.full((batch,), 100)
    tables = [[2 * i, 2 * i + 1] for i in range(batch)]
    start = time.process_time()
    for at in range(steps):
        hidden = model.forward(ids, make_batch([1] * batch, [at] * batch, tables, 16), cache)
        model.top_logits(hidden, 1)
    return batch * steps / (time.process_time() - start)


def prompted(model: DecoderModel) -> float:
    """Tokens per second of a prompt."""
    cache, ids = model.new_cache(WINDOW // 16, 16, "bfloat16"), torch.arange(100, 100 + WINDOW)
    start = time.process_time()
    hidden = model.forward(ids, make_batch([WINDOW], [0], [list(range(WINDOW // 16))], 16), cache)
    model.top_logits(hidden[-1:], 1)
    return WINDOW / (time.process_time() - start)


POINTS: dict[str, Callable[[DecoderModel], float]] = {
    "batch 1": partial(decoded, batch=1),
    "batch 2": partial(decoded, batch=2),
    "batch 8": partial(decoded, batch=8),
    f"prompt of {WINDOW}": prompted,
}


def speeds(model: str, rounds: int, quantization: Any) -> dict[str, dict[str, list[float]]]:
    """Of each way: tokens per second of one core at every point, round by round after an untimed one."""
    path = resolve_model(model)
    models = {
        way: load(path, select("cpu", None, 1, quantization, compute=way))  # type: ignore[arg-type]
        for way in WAYS
    }
    found: dict[str, dict[str, list[float]]] = {way: {name: [] for name in POINTS} for way in WAYS}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, measure in POINTS.items():
                for way in WAYS if turn % 2 else WAYS[::-1]:
                    rate = measure(models[way])
                    found[way][name] += [rate] if turn else []
    return found


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, a row per model and way."""
    names = [f"{name}, tokens/s" for name in POINTS]
    yield f"| model | compute | KL, nats | perplexity | same answers | first tokens | {' | '.join(names)} |"
    yield "|---" * (6 + len(names)) + "|"
    for row in rows:
        rates = [
            f"{median(found):.0f} ({median(map(truediv, found, row['base'][name])):.2f}x)"
            for name, found in row["speeds"].items()
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
            own = {"speeds": timed[way], "base": timed["int8"]}
            rows.append({"model": model, "compute": way, **own, **found})
    print(to_json(rows) if given.json else "\n".join(table(rows)))


if __name__ == "__main__":
    main()
