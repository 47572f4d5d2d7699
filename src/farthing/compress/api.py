"""`compress`: apply a recipe to a checkpoint, then compare the result with the source (the accuracy gate)."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farthing.compress.adaptive import AdaptivePlan, calibrate_adaptive, write_adaptive
from farthing.compress.evaluate import (
    Comparison,
    Corpus,
    Verdict,
    calibration_corpus,
    compare_with,
    halves,
    load_corpus,
)
from farthing.compress.export import (
    choose_export,
    expected_bytes,
    expected_limits,
    for_export,
    transformers_limits,
)
from farthing.compress.layerwise import baseline, has_fitted_values, ops_for
from farthing.compress.needs import check_memory, check_needs
from farthing.compress.plan import PlanResult, make_plan
from farthing.compress.recipe import Recipe
from farthing.compress.report import CompressionReport
from farthing.compress.size import Sizes, head_in_8_bits, measured_shares, reads_of, sizes_of
from farthing.compress.source import PlainCheckpoint
from farthing.compress.stream import Compression, Progress, Progressed, finish, refuse_finished, run
from farthing.config import Quantization
from farthing.model import DecoderModel, ModelConfig, parameter_shapes
from farthing.model.load import load
from farthing.ops.select import known_backends, select


def held_out_sample() -> Path:
    """File of the embedded model's held-out text."""
    return Path(__file__).parents[1] / "assets" / "mite" / "heldout.jsonl"


def parse_share(name: str, text: str) -> float:
    """'0.3%' or '0.003' -> 0.003. Raises ValueError naming the option."""
    value = text.strip()
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 10:
        raise ValueError(f"{name}: got {text!r}; expected a share such as 0.3% or 0.003")
    return share


def load_for(
    path: Path, backend: str = "auto", simulate: bool = False, quantization: Quantization | None = None
) -> DecoderModel:
    """Load a model on a serving backend, which may round dense weights, or in float32 with simulated
    activation rounding."""
    return load(path, ops_for(path, "simulate" if simulate else backend, quantization))


def compare_in_turn(
    a: Path,
    b: Path,
    corpus: Corpus,
    backends: tuple[str, str] = ("auto", "auto"),
    progress: Callable[[int], None] | None = None,
    quantization: Quantization | None = None,
) -> Comparison:
    """Compare B with A, with one layer in memory at a time, and both models' norms and heads.

    backends: of A and B; "simulate" and "exact" are some. progress: called with tokens, twice the corpus in
    total. quantization: of B's dense weights while loading.
    """
    first = baseline(a, corpus, backends[0], progress)
    return compare_with(first, baseline(b, corpus, backends[1], progress, quantization), corpus)


def check_backend(backend: str) -> None:
    """Raise unless `backend` is "simulate" or runs on this machine."""
    if backend == "simulate":
        return
    backends = sorted({*known_backends(), "simulate"})
    if backend != "auto" and backend.partition("/")[0] not in backends:
        raise ValueError(f"backend: got {backend!r}; expected 'auto' or one of {backends}")
    select(backend)


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
    export: str = "auto"  # see `export.py`
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
            "kl_elsewhere": r.elsewhere.kl if r.elsewhere else None,
            "greedy_agreement": q.greedy_agreement if q else None,
            "verdict": self.verdict.answer if self.verdict else None,
        }


def check_before_download(path: Path, out: Path, recipe: Recipe, options: Options) -> None:
    """Raise ValueError for what `compress` would refuse of a model of which `path` has only config.json."""
    refuse_finished(out)
    if options.check_memory:
        config = ModelConfig.from_directory(path)
        check_memory(config, parameter_shapes(config), recipe)


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
    recipe = for_export(options.export, recipe)
    options, judged = _ready(source, out, recipe, options, config)
    compressed = _make(source, out, recipe, options, config, progress)
    seconds = time.monotonic() - start
    peak = peak_memory()
    quality, elsewhere = None, None
    if options.gate:
        judged = compressed.judged or judged
        assert judged is not None
        quality, elsewhere = _measure(source, out, options, judged, progress)
    verdict = quality.verdict(options.max_drop) if quality and options.max_drop is not None else None
    before, result = PlainCheckpoint.open(source), PlainCheckpoint.open(out)
    larger = grown(before.stored_bytes(), result.stored_bytes())
    if larger:
        log.warning("%s", larger)
    report = CompressionReport(
        recipe=compressed.recipe.to_json()
        | ({"calibrated": compressed.adaptive.to_json()} if compressed.adaptive else {}),
        source=str(source),
        export=options.export,
        transformers_limits=transformers_limits(options.export, result, compressed.state.group_keys()),
        size_before=before.stored_bytes(),
        size_after=result.stored_bytes(),
        larger=larger,
        sizes={
            "before": asdict(sizes_of(before, reads_of(config))),
            "after": asdict(_result(result, compressed)),
        },
        seconds=seconds,
        peak_memory=peak,
        modules=compressed.state.modules,
        coverage=compressed.state.coverage,
        healed=compressed.state.healed,
        plan=compressed.plan.to_json() if compressed.plan else None,
        quality=quality,
        elsewhere=elsewhere,
        verdict=verdict,
        serving=after(out) if after else [],
    )
    try:
        outcome = Outcome(report, report.write(out), verdict)
        finish(out)
        return outcome
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


def _weight_bytes(checkpoint: PlainCheckpoint) -> int:
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
    if config.streams is not None and (recipe.scheme == "auto" or recipe.adaptive):
        raise ValueError(
            f"recipe: got {recipe.name!r} for model_type {config.model_type!r}; expected one whose formats "
            "are given, such as int4 or int8"
        )
    checkpoint = PlainCheckpoint.open(source)
    options = replace(options, export=choose_export(options.export, recipe, checkpoint, config))
    if limits := expected_limits(options.export, checkpoint, config, recipe):
        verb = "may" if recipe.scheme == "auto" or recipe.adaptive else "will"
        log.warning("transformers 5.24 %s not reproduce the result: %s", verb, "; ".join(limits))
    expected = expected_bytes(options.export, checkpoint, config, recipe)
    if expected is not None and (said := grown(_weight_bytes(checkpoint), expected)):
        log.warning("expected: %s", said)
    if options.check_memory:
        check_needs(checkpoint, out, recipe, expected)
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
    form = plan.format if plan else None
    state = run(Compression(source, out, recipe, corpus, form, options.export), progress, keep=True)
    return _Made(recipe, state, plan, tokens=corpus.tokens if corpus else 0)


def _result(checkpoint: PlainCheckpoint, compressed: _Made) -> Sizes:
    """Sizes of the result, with experts read as often as in calibration or by the adaptive rule."""
    config = ModelConfig.from_json(checkpoint.config)
    routed = {
        int(row["layer"]): measured_shares(row["tokens_per_expert"], compressed.tokens)
        for row in compressed.state.coverage
    }
    if compressed.adaptive:
        for layer in filter(config.is_moe, range(config.num_hidden_layers)):
            experts = config.experts_in(layer) or 1
            routed[layer] = [compressed.adaptive.experts_after / experts] * experts
    saved = {m["module"]: m["zero_block_bytes"] for m in compressed.state.modules if m["zero_block_bytes"]}
    if config.head.rounded_head:
        head, rounded = head_in_8_bits(checkpoint)
        saved[head] = max(checkpoint.nbytes(f"{head}.weight") - rounded, 0)
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
) -> tuple[Comparison, Comparison | None]:
    """The result compared with the source, as Farthing serves it; and as other programs read its files, if
    they read other weights."""
    # The source runs in its best arithmetic: dequantized, without activation rounding.
    of_source = "reference" if options.backend == "simulate" else options.backend
    readings = [True, False] if has_fitted_values(out) else [True]
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress("measuring", done, (1 + len(readings)) * corpus.tokens)

    original = baseline(source, corpus, of_source, advance)
    served, *elsewhere = (
        compare_with(original, baseline(out, corpus, options.backend, advance, exact=exact), corpus)
        for exact in readings
    )
    for quality in elsewhere:
        log.warning(
            "other programs read evenly spaced values from these files: KL %.4f instead of %.4f; "
            "--format llm-compressor writes values that are calibrated for them",
            quality.kl,
            served.kl,
        )
    return served, elsewhere[0] if elsewhere else None


def peak_memory() -> int:
    """Peak resident set size of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
