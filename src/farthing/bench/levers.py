"""The rows of `farthing bench cost`: the original, then one more lever per row, calibrated within a budget.

Weights are rounded by `int8-auto` and `int4-gptq`, which leave the head alone; it is rounded to INT8 while
loading. The calibrated adaptive experts may then use the rest of the budget. Every row's quality is measured
against the original on held-out text not used for calibration. Speculation changes no token, so its row has
the quality of the previous one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farthing.compress.api import Options, compress
from farthing.compress.corpus import Corpus, halves, load_corpus
from farthing.compress.evaluate import Comparison, compare_with
from farthing.compress.gate import baseline, held_out_sample, load_for
from farthing.compress.recipe import load_recipe
from farthing.model import ModelConfig

WINDOW = 1024
HEAD: dict[str, Any] = {"quantization": "int8"}  # of what a calibrated checkpoint left dense
ORIGINAL = "Hugging Face eager, bf16"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Lever:
    """A row. options: fields of EngineConfig; None: the original. model: a directory; None: the source."""

    name: str
    options: dict[str, Any] | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """Relative change of perplexity from the original, with its paired 95 % confidence interval."""

    change: float
    low: float
    high: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.change:+.2%} ({self.low:+.2%} … {self.high:+.2%})"


@dataclass(frozen=True, slots=True)
class Texts:
    """Held-out text, split by document: one half for calibration, the other only for evaluation."""

    calibration: Corpus
    judged: Corpus

    @classmethod
    def of(cls, source: Path, max_tokens: int | None = None) -> Texts:
        """Split the held-out text of `source`. Raises ValueError without a tokenizer."""
        if not (source / "tokenizer.json").exists():
            raise ValueError(f"{source} has no tokenizer.json; expected one to measure quality on text")
        config = ModelConfig.from_directory(source)
        return cls(*halves(load_corpus(held_out_sample(), source, config, WINDOW, max_tokens)))


def levers(source: Path, work: Path, budget: float, texts: Texts, say: Say = lambda _: None) -> list[Lever]:
    """All rows of a dense checkpoint, each adding a lever to the previous row.

    budget: maximum relative perplexity increase of all levers together. work: directory of the calibrated
    checkpoints; finished ones are reused.
    """
    config = ModelConfig.from_directory(source)
    rows = [Lever(ORIGINAL), Lever("Farthing kernels and engine", {})]
    for recipe in ("int8-auto", "int4-gptq"):
        made = _calibrated(source, work / recipe, recipe, budget, say)
        rows.append(Lever(f"+ {recipe} weights", HEAD, str(made)))
    if config.n_routed_experts:
        spent = quality(source, made, texts.calibration).change
        rest = (1 + budget) / (1 + max(0.0, spent)) - 1
        if rest <= 0:
            say(
                f"{made.name} costs {spent:+.2%} on the calibration text; no budget left for adaptive experts"
            )
        else:
            made = _calibrated(made, work / "adaptive", "adaptive-experts", rest, say)
            rows.append(Lever("+ adaptive experts", HEAD, str(made)))
    drafts = "mtp+ngram" if config.num_nextn_predict_layers else "ngram"
    return [*rows, Lever("+ speculation: all together", HEAD | {"speculate": drafts}, str(made))]


def quality(source: Path, model: Path, corpus: Corpus) -> Quality:
    """Quality of a checkpoint on the serving kernels relative to `source` in reference arithmetic."""
    served = load_for(model, **HEAD)
    return _quality(compare_with(baseline(source, corpus, "reference"), served, corpus))


def qualities(source: Path, rows: Sequence[Lever], corpus: Corpus) -> Iterator[tuple[str, Quality | None]]:
    """(row name, quality); None for the original, the baseline of the others."""
    base = baseline(source, corpus, "reference")
    known: dict[str, Quality] = {}
    for row in rows:
        if row.options is None:
            yield row.name, None
            continue
        model = row.model or str(source)
        if model not in known:
            served = load_for(Path(model), quantization=row.options.get("quantization"))
            known[model] = _quality(compare_with(base, served, corpus))
        yield row.name, known[model]


def _quality(found: Comparison) -> Quality:
    return Quality(found.relative_increase, *found.interval, found.tokens)


def _calibrated(source: Path, out: Path, recipe: str, budget: float, say: Say) -> Path:
    """Compress `source` by a recipe with its gate off; quality is measured per row instead."""
    if (out / "report.json").exists():
        return out
    say(f"calibrating {recipe}")
    chosen = load_recipe(recipe)
    if chosen.adaptive:
        chosen = replace(chosen, max_drop=budget)
    compress(source, out, chosen, Options(window=WINDOW, gate=False))
    return out
