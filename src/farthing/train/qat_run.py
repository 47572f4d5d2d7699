"""A quantization-aware training run: train, export, report."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from farthing.files import replace, replace_json
from farthing.train import blocks
from farthing.train.finetune import (
    Settings,
    Sources,
    Text,
    curve,
    determining,
    interval,
    provenance,
    resampled,
    weights_sha256,
    window_nats,
)
from farthing.train.gptq import round_by_gptq
from farthing.train.lsq import Precision
from farthing.train.model import DeepSeekLM
from farthing.train.need import random_twin
from farthing.train.picture import Points, plot
from farthing.train.qat import build
from farthing.train.qat_export import is_exportable, save_quantized
from farthing.train.qat_model import QatConfig, QatModel
from farthing.train.resume import check_start, require_same

NEED_WINDOWS = 16  # of held-out text on which the need of blocks is measured
_CACHE = "untrained.pt"  # losses before training, for a resumed run


def untrained(
    teacher: DeepSeekLM, smoothed: DeepSeekLM, tokens: Tensor, config: QatConfig, precision: Precision
) -> Iterator[tuple[str, DeepSeekLM]]:
    """(name, net) of every way to reach the format without training; `smoothed` computes as the teacher does.

    Weights are rounded to nearest with the ranges of least error and, for 4 bits, by GPTQ on tokens [N, T].
    """
    for prefix, net in (("", teacher), ("smoothed ", smoothed)):
        rounded = QatModel(copy.deepcopy(net), config)
        rounded.start(precision)
        yield f"{prefix}nearest", rounded.net
        if precision.weights == 4:
            rounded = QatModel(copy.deepcopy(net), config)
            round_by_gptq(rounded, tokens, precision)
            yield f"{prefix}GPTQ", rounded.net


def train_qat(
    settings: Settings, config: QatConfig, resume: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Train a quantized checkpoint: write OUT/checkpoint, OUT/qat.json and OUT/qat.png.

    Returns the summary, or None if interrupted (state is saved). With `tensor` inputs there is no checkpoint.
    Raises ValueError if the last stage cannot be exported.
    """
    console = console or Console(stderr=True)
    require_exportable(config)
    sources = Sources.read(settings)
    given = determining(settings, config, sources)
    check_start(settings.out / "state.pt", given, resume)
    trainer, text, teacher = build(settings, config, console, sources)
    trainer.settings = given
    student = trainer.model
    assert isinstance(student, QatModel)

    def score(net: DeepSeekLM) -> Tensor:
        return window_nats(net, text.heldout, settings.window, settings.eval_tokens)

    precision = config.stages[-1][1]
    found = _stored(settings.out, given) if resume else None
    if found is None:
        found = {"float": score(teacher)}
        if config.block is None:
            batch = text.batches.next(config.block_windows, settings.window)[:, :-1].to(settings.device)
            for name, net in untrained(teacher, student.net, batch, config, precision):
                found[f"untrained, {name}"] = score(net)
            stored = {"settings": given, "found": found}
            replace(settings.out / _CACHE, lambda file: torch.save(stored, file))
    console.print(f"{precision}: " + "; ".join(f"{k} {_perplexity(v):.3f}" for k, v in found.items()))
    if resume:
        trainer.load()
    if not trainer.run():
        return None
    exported: dict[str, Any] = {}
    if config.inputs == "group":
        exported["weights_bytes"] = save_quantized(student, settings.model, settings.out / "checkpoint")
        exported["checkpoint_sha256"] = weights_sha256(settings.out / "checkpoint")
    found["trained"] = score(student.net)
    summary: dict[str, Any] = {
        "precision": str(precision),
        "perplexity": {name: _perplexity(rows) for name, rows in found.items()},
        **gained(found),
        **provenance(settings, config, text, sources),
        "config": config.recorded(),
        **({} if config.block is None else _zero_blocks(student, teacher, text, settings)),
        **exported,
        "minutes": trainer.active_seconds / 60,
        "tokens": trainer.tokens,
        "budgets": trainer.budgets,
        "curve": trainer.record,
    }
    _write(settings.out, summary, curve(trainer, "perplexity"))
    return summary


def _stored(out: Path, given: dict[str, Any]) -> dict[str, Tensor] | None:
    """Losses before training that the interrupted run stored, if it did; ValueError if it was another run."""
    cache = out / _CACHE
    stored: dict[str, Any] = torch.load(cache, weights_only=True) if cache.is_file() else {}
    if "settings" not in stored:
        return None
    require_same(cache, stored["settings"], given)
    found: dict[str, Tensor] = stored["found"]
    return found


def _write(out: Path, summary: dict[str, Any], trained: Points) -> None:
    replace_json(out / "qat.json", summary)
    levels = {k: v for k, v in summary["perplexity"].items() if k in ("float", summary.get("best_untrained"))}
    plot(out / "qat.png", {"trained": trained}, "held-out perplexity", levels=levels)


def require_exportable(config: QatConfig) -> None:
    """Raise ValueError if the run would end in a format that no checkpoint holds."""
    last = config.stages[-1][1]
    if config.inputs == "group" and not is_exportable(last, config.inputs):
        raise ValueError(f"stages: got {last} at the end; expected W4A4 or W4A8, which a checkpoint can hold")


def _zero_blocks(
    student: QatModel, teacher: DeepSeekLM, text: Text, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Where the zero blocks are, and how much the others are needed on held-out text: after, before, and in
    random weights.
    """
    rows = [d[: settings.window + 1].astype("int64") for d in text.heldout if len(d) > settings.window]
    tokens = torch.stack([torch.from_numpy(ids) for ids in rows[:NEED_WINDOWS]]).to(settings.device)
    models = {
        "before": QatModel(copy.deepcopy(teacher), student.config),
        "after": student,
        "random": QatModel(random_twin(teacher, settings.seed), student.config),
    }
    for model in models.values():
        model.to(settings.device).net.set_compute_dtype(torch.bfloat16)
    return {"zero_blocks": blocks.describe(student), "needed_blocks": blocks.needed_blocks(models, tokens)}


def _perplexity(rows: Tensor) -> float:
    nats, count = rows.sum(0).tolist()
    return math.exp(nats / count)


def gained(found: dict[str, Tensor]) -> dict[str, Any]:
    """Loss of the trained net over the float one, and the share of the best untrained net's loss (same
    format, if there is one) that training recovered, with 95 % intervals over resampled windows.

    There is no float control: distilled from itself, the float net starts with a gradient of zero.
    """
    base, trained = (_perplexity(found[name]) for name in ("float", "trained"))
    means = resampled(found)
    ours = (means["trained"] - means["float"]).expm1()
    summary: dict[str, Any] = {
        "relative_increase": trained / base - 1,
        "relative_increase_interval": interval(ours),
    }
    rounded = {name: _perplexity(rows) for name, rows in found.items() if name.startswith("untrained")}
    if not rounded:
        return summary
    best = min(rounded, key=rounded.__getitem__)
    summary |= {"best_untrained": best, "recovered": None}
    if rounded[best] > base:
        summary["recovered"] = (rounded[best] - trained) / (rounded[best] - base)
        summary["recovered_interval"] = interval(1 - ours / (means[best] - means["float"]).expm1())
    return summary
