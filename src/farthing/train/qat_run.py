"""A quantization-aware training run: train, export, report."""

from __future__ import annotations

import copy
from typing import Any

from rich.console import Console

from farthing.files import replace_json
from farthing.train.finetune import Settings, curve, perplexity
from farthing.train.lsq import Precision
from farthing.train.model import DeepSeekLM
from farthing.train.qat import QatConfig, QatModel, build
from farthing.train.qat_export import save_quantized


def _untrained(net: DeepSeekLM, config: QatConfig, precision: Precision) -> DeepSeekLM:
    """The net with rounded products and least-squares ranges."""
    rounded = QatModel(net, config)
    rounded.start(precision)
    return rounded.net


def train_qat(
    settings: Settings, config: QatConfig, resume: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Train a quantized checkpoint: write OUT/checkpoint, OUT/qat.json and OUT/qat.png.

    Returns the summary, or None if interrupted (state is saved).
    """
    from farthing.train.picture import plot

    console = console or Console(stderr=True)
    trainer, text, teacher = build(settings, config, console)
    student = trainer.model
    assert isinstance(student, QatModel)

    def score(net: DeepSeekLM) -> float:
        return perplexity(net, text.heldout, settings.window, settings.eval_tokens)

    precision = config.stages[-1][1]
    float_perplexity = score(teacher)
    ptq_perplexity = score(_untrained(copy.deepcopy(teacher), config, precision))
    smoothed_perplexity = score(_untrained(copy.deepcopy(student.net), config, precision))
    console.print(
        f"float {float_perplexity:.3f}; {precision} without training {ptq_perplexity:.3f}, "
        f"smoothed {smoothed_perplexity:.3f}"
    )
    if resume:
        trainer.load()
    if not trainer.run():
        return None
    size = save_quantized(student, settings.model, settings.out / "checkpoint")
    perplexities = {
        "float": float_perplexity,
        "untrained": ptq_perplexity,
        "smoothed": smoothed_perplexity,
        "trained": score(student.net),
    }
    summary: dict[str, Any] = {
        "precision": str(precision),
        "perplexity": perplexities,
        **_gained(perplexities),
        "eval_tokens": settings.eval_tokens,
        "window": settings.window,
        "weights_bytes": size,
        "minutes": trainer.active_seconds / 60,
        "tokens": trainer.tokens,
        "curve": trainer.record,
    }
    replace_json(settings.out / "qat.json", summary)
    levels = {
        "float": float_perplexity,
        f"{precision} untrained": ptq_perplexity,
        "smoothed": smoothed_perplexity,
    }
    plot(
        settings.out / "qat.png",
        {"trained": curve(trainer, "perplexity")},
        "held-out perplexity",
        levels=levels,
    )
    return summary


def _gained(perplexity: dict[str, float]) -> dict[str, float | None]:
    """Share of the best untrained loss (same format) that training recovered."""
    best = min(perplexity["untrained"], perplexity["smoothed"])
    lost = best - perplexity["float"]
    return {
        "relative_increase": perplexity["trained"] / perplexity["float"] - 1,
        "best_untrained": best,
        "recovered": (best - perplexity["trained"]) / lost if lost > 0 else None,
    }
