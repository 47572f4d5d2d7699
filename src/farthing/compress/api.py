"""`compress`: apply a recipe to a checkpoint, then run the accuracy gate."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farthing.checkpoint import Checkpoint
from farthing.compress.adaptive import AdaptivePlan, calibrate_adaptive, write_adaptive
from farthing.compress.corpus import Corpus, calibration_corpus, halves, load_corpus
from farthing.compress.evaluate import Comparison, Verdict
from farthing.compress.export.layout import (
    choose_export,
    expected_bytes,
    expected_limits,
    transformers_limits,
)
from farthing.compress.gate import check_backend, compare_in_turn, held_out_sample, load_for
from farthing.compress.needs import check_needs
from farthing.compress.plan import PlanResult, make_plan
from farthing.compress.recipe import Recipe
from farthing.compress.report import CompressionReport
from farthing.compress.size import Sizes, measured_shares, reads_of, sizes_of
from farthing.compress.stream import Job, Progress, Progressed, refuse_finished, run
from farthing.model import ModelConfig

log = logging.getLogger(__name__)
GATE_TOKENS = 16384  # held-out tokens for the gate; if undecided, it reports how many would decide


@dataclass(frozen=True, slots=True)
class Options:
    """How `compress` calibrates, evaluates and exports."""

    calibration: Path | None = None  # JSON lines; None: sources of the Python standard library
    data: Path | None = None  # held-out JSON lines for the gate; None: the embedded sample
    max_drop: float | None = None
    backend: str = "auto"  # arithmetic of the gate; default: the kernels that serve on this machine
    window: int = 1024
    max_tokens: int | None = None  # of held-out text; None: GATE_TOKENS for the gate
    export: str = "auto"  # see `export/layout.py`
    gate: bool = True
    check_memory: bool = True  # refuse a run for which memory or disk is too small


@dataclass(frozen=True, slots=True)
class Outcome:
    """The document of `farthing compress --json`, and the verdict for its exit status."""

    report: CompressionReport
    path: Path
    verdict: Verdict | None

    def to_json(self) -> dict[str, Any]:
        """The JSON document."""
        r, q = self.report, self.report.quality
        return {
            "size_before": r.size_before,
            "size_after": r.size_after,
            "larger": r.larger,
            "bytes_per_token_before": r.sizes["before"]["token"],
            "bytes_per_token_after": r.sizes["after"]["token"],
            "drop": q.relative_increase if q else None,
            "drop_interval": list(q.interval) if q else None,
            "seconds": r.seconds,
            "peak_memory": r.peak_memory,
            "report": str(self.path),
            "format": r.export,
            "transformers_limits": r.transformers_limits,
            "kl": q.kl if q else None,
            "greedy_agreement": q.greedy_agreement if q else None,
            "verdict": self.verdict.answer if self.verdict else None,
        }


def compress(
    source: Path,
    out: Path,
    recipe: Recipe,
    options: Options | None = None,
    progress: Progress | None = None,
    after: Callable[[Path], list[dict[str, Any]]] | None = None,
) -> Outcome:
    """Compress `source` into `out`, measure the result and write the report.

    after: called with `out` once it is complete; returns rows of measurements of the served result for the
    report. Raises CheckpointError, ConfigError or ValueError, each with the next step.
    """
    options = options or Options()
    start = time.monotonic()
    config = ModelConfig.from_directory(source)
    options, judged = _ready(source, out, recipe, options, config)
    made = _make(source, out, recipe, options, config, progress)
    seconds = time.monotonic() - start
    peak = peak_memory()
    quality = None
    if options.gate:
        judged = made.judged or judged
        assert judged is not None
        quality = _measure(source, out, options, judged, progress)
    verdict = quality.verdict(options.max_drop) if quality and options.max_drop is not None else None
    before, result = Checkpoint.open(source), Checkpoint.open(out)
    larger = grown(before.stored_bytes(), result.stored_bytes())
    if larger:
        log.warning("%s", larger)
    report = CompressionReport(
        recipe=made.recipe.to_json() | ({"calibrated": made.adaptive.to_json()} if made.adaptive else {}),
        source=str(source),
        export=options.export,
        transformers_limits=transformers_limits(options.export, result, made.state.group_keys()),
        size_before=before.stored_bytes(),
        size_after=result.stored_bytes(),
        larger=larger,
        sizes={"before": asdict(sizes_of(before, reads_of(config))), "after": asdict(_result(result, made))},
        seconds=seconds,
        peak_memory=peak,
        modules=made.state.modules,
        coverage=made.state.coverage,
        healed=made.state.healed,
        plan=made.plan.to_json() if made.plan else None,
        quality=quality,
        verdict=verdict,
        serving=after(out) if after else [],
    )
    try:
        return Outcome(report, report.write(out), verdict)
    except OSError as error:
        said = f"{error.strerror} (the model in {out} is complete; only its report is missing)"
        raise OSError(error.errno, said, error.filename) from error


def grown(before: int, after: int) -> str | None:
    """A sentence for a result that is larger than its source; None for one that is not."""
    if after <= before:
        return None
    return (
        f"the result is larger than its source: {before:,} -> {after:,} bytes ({after / before - 1:+.0%}); "
        "choose a recipe with fewer bits than the source has (farthing compress --list)"
    )


def _weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors, without the headers of the files."""
    return sum(map(checkpoint.nbytes, checkpoint.names()))


def _ready(
    source: Path, out: Path, recipe: Recipe, options: Options, config: ModelConfig
) -> tuple[Options, Corpus | None]:
    """The options with the export chosen, and the gate's text.

    Raises now, not after minutes of work, if the run cannot succeed. Logs what transformers will not
    reproduce.
    """
    refuse_finished(out)
    checkpoint = Checkpoint.open(source)
    options = replace(options, export=choose_export(options.export, recipe, checkpoint, config))
    if limits := expected_limits(options.export, checkpoint, config, recipe):
        verb = "may" if recipe.scheme == "auto" or recipe.adaptive else "will"
        log.warning("transformers 5.24 %s not reproduce the result: %s", verb, "; ".join(limits))
    expected = expected_bytes(options.export, checkpoint, config, recipe)
    if expected is not None and (said := grown(_weight_bytes(checkpoint), expected)):
        log.warning("expected: %s", said)
    if options.check_memory:
        check_needs(checkpoint, out, recipe, expected, options.gate)
    if not options.gate:
        return options, None
    check_backend(options.backend)
    sampled = replace(options, max_tokens=options.max_tokens or GATE_TOKENS)
    return options, _held_out(source, sampled, config)


@dataclass(frozen=True, slots=True)
class _Made:
    """A written result and how it was made."""

    recipe: Recipe
    state: Progressed
    plan: PlanResult | None = None
    adaptive: AdaptivePlan | None = None
    judged: Corpus | None = None  # the text for the gate, if part of it was used for calibration
    tokens: int = 0  # for calibration


def _make(
    source: Path, out: Path, recipe: Recipe, options: Options, config: ModelConfig, progress: Progress | None
) -> _Made:
    """Write the result."""
    if recipe.adaptive:
        if options.calibration is None:
            # The rule is chosen by its loss, which training text would understate.
            chosen, judged = halves(_held_out(source, options, config))
        else:
            chosen, judged = _calibration(source, recipe, options, config), None
        adaptive = _adapt(source, out, recipe, chosen, progress)
        return _Made(recipe, Progressed(""), adaptive=adaptive, judged=judged)
    corpus = _calibration(source, recipe, options, config) if recipe.needs_data else None
    plan: PlanResult | None = None
    if recipe.scheme == "auto":
        assert corpus is not None
        plan = make_plan(source, out, recipe, corpus, progress)
        recipe = plan.recipe(recipe)
    state = run(Job(source, out, recipe, corpus, plan.format if plan else None, options.export), progress)
    return _Made(recipe, state, plan, tokens=corpus.tokens if corpus else 0)


def _result(checkpoint: Checkpoint, made: _Made) -> Sizes:
    """Sizes of the result, with experts read as often as in calibration or by the adaptive rule."""
    config = ModelConfig.from_json(checkpoint.config)
    routed = {
        int(row["layer"]): measured_shares(row["tokens_per_expert"], made.tokens)
        for row in made.state.coverage
    }
    if made.adaptive:
        for layer in filter(config.is_moe, range(config.num_hidden_layers)):
            experts = config.at(layer).n_routed_experts or 1
            routed[layer] = [made.adaptive.experts_after / experts] * experts
    saved = {m["module"]: m["zero_block_bytes"] for m in made.state.modules if m["zero_block_bytes"]}
    return sizes_of(checkpoint, reads_of(config, routed), saved)


def _adapt(
    source: Path, out: Path, recipe: Recipe, corpus: Corpus, progress: Progress | None
) -> AdaptivePlan:
    """Write `source` with a calibrated adaptive-experts rule and unchanged weights."""
    model = load_for(source, "auto")

    def on_trial(done: int, total: int) -> None:
        if progress:
            progress("trying layers", done, total)

    plan = calibrate_adaptive(model, corpus, recipe.allowed_drop or 0.0, on_trial=on_trial)
    write_adaptive(source, out, plan, model)
    return plan


def _calibration(source: Path, recipe: Recipe, options: Options, config: ModelConfig) -> Corpus:
    if options.calibration is not None:
        size = recipe.window, recipe.calibration_tokens
        return load_corpus(options.calibration, source, config, *size, option="calibration")
    held_out = options.data or held_out_sample()
    return calibration_corpus(source, config, held_out, recipe.calibration_tokens, recipe.window)


def _held_out(source: Path, options: Options, config: ModelConfig) -> Corpus:
    return load_corpus(options.data or held_out_sample(), source, config, options.window, options.max_tokens)


def _measure(
    source: Path, out: Path, options: Options, corpus: Corpus, progress: Progress | None
) -> Comparison:
    # The source runs in its best arithmetic: dequantized, without activation rounding.
    of_source = "reference" if options.backend == "simulate" else options.backend
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress("measuring", done, 2 * corpus.tokens)

    return compare_in_turn(source, out, corpus, (of_source, options.backend), advance)


def peak_memory() -> int:
    """Peak resident set size of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
