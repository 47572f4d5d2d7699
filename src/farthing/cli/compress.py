"""`farthing compress` writes a smaller checkpoint; `farthing eval` judges one, alone or against another."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing.cli.errors import errors_as_one_line, exit_on_verdict, with_options
from farthing.cli.tables import step_progress, token_progress
from farthing.config import Quantization, check, option
from farthing.files import to_json
from farthing.hub import find_model
from farthing.memory import keep_freed_memory
from farthing.model.config import ModelConfig

if TYPE_CHECKING:
    from farthing.compress.api import Outcome
    from farthing.compress.estimate import Estimate
    from farthing.compress.evaluate import Verdict
    from farthing.compress.recipe import Recipe


# `farthing eval`: evaluate a model, or compare it with another.

eval_app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Served:
    """How a model is loaded to be judged."""

    backend: str
    quantization: Quantization | None


@eval_app.command(
    name="eval",
    epilog="Examples:  farthing eval  |  farthing eval ./model --data text.jsonl --json  |  "
    "farthing eval ./model --against ./model-int4 --max-drop 1.5%  |  "
    "farthing eval ./model --against ./model --quantization int4",
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A directory, a hub id or `mite`."),
    ] = "mite",
    against: Annotated[str | None, typer.Option(help="Model B to compare with MODEL.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines with 'text' or 'ids'."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Maximum perplexity increase with --against; exit 4 if exceeded, 3 if undecided."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Maximum context length in tokens.")] = 1024,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Approximate number of tokens to evaluate.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, gpu or torch.")] = "auto",
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Round dense weights while loading, as `serve` does; with --against, those of B."),
    ] = None,
    simulate: Annotated[
        bool, typer.Option(help="Use reference ops with the checkpoint's activation rounding.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Perplexity, bits per byte and MTP acceptance on held-out text; with --against, B compared with A.

    Exit codes: 0 done; 1 unexpected error; 2 invalid input; 3 too little text to decide --max-drop;
    4 worse than --max-drop; 5 read failed.
    """
    from farthing.compress.api import parse_share

    with errors_as_one_line():
        limit = parse_share("max-drop", max_drop) if max_drop is not None else None
        if quantization is not None and simulate:
            raise ValueError(f"quantization: got {quantization!r} with --simulate; expected one of them")
        served = Served("simulate" if simulate else backend, quantization)
        document, verdict = _measure(model, against, data, limit, (window, max_tokens), served)
    _print_figures(document, as_json)
    if verdict is not None:
        exit_on_verdict(verdict.answer, str(verdict))


def _measure(
    model: str,
    against: str | None,
    data: Path | None,
    limit: float | None,
    cut: tuple[int, int | None],
    served: Served,
) -> tuple[dict[str, object], Verdict | None]:
    """The document to print, and the verdict if a limit is set. cut: (window, maximum tokens)."""
    from farthing.compress import evaluate as ev
    from farthing.compress.api import check_backend, compare_in_turn, held_out_sample, load_for
    from farthing.compress.evaluate import load_corpus

    if data is not None:
        ev.check_data(data)
    found, other = find_model(model), None if against is None else find_model(against)
    check_backend(served.backend)  # before a download
    path = found.fetch()
    config = ModelConfig.from_directory(path)
    corpus = load_corpus(data or held_out_sample(), path, config, cut[0], cut[1])
    if other is None:
        with token_progress("measuring", corpus.tokens) as advance:
            judged = load_for(path, served.backend, quantization=served.quantization)
            return asdict(ev.evaluate(judged, corpus, progress=advance)), None
    with token_progress("comparing", 2 * corpus.tokens) as advance:
        backends = (served.backend, served.backend)
        result = compare_in_turn(path, other.fetch(), corpus, backends, advance, served.quantization)
    verdict = result.verdict(limit) if limit is not None else None
    document: dict[str, object] = result.to_json()
    if verdict is not None:
        document |= {"verdict": verdict.answer, "max_drop": limit, "tokens_needed": verdict.tokens_needed}
    return document, verdict


def _print_figures(document: dict[str, object], as_json: bool) -> None:

    if as_json:
        print(to_json(document))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in document.items():
        table.add_row(name, f"{value:.5g}" if isinstance(value, float) else str(value))
    Console().print(table)


app = typer.Typer(add_completion=False)


_option = partial(option, group="Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """What to compress, how, and how to check the result."""

    model: str = _option("mite", "A directory, a hub id, or `mite`", argument=True)
    out: Path | None = _option(None, "Output directory", flags=("-o",))
    recipe: str | None = _option(
        None,
        "Recipe name (see --list) or .yaml file; default: int8 for weights in 16 or 32 bits, int4 for "
        "a quantized source",
    )
    calibration: Path | None = _option(None, "Calibration text: JSON lines with 'text' or 'ids'")
    data: Path | None = _option(None, "Held-out text for the accuracy gate, JSON lines")
    max_drop: str | None = _option(
        None, "Maximum perplexity increase (0.3%); exit 4 if exceeded, 3 if undecided"
    )
    budget: str | None = _option(None, "Size limit for automatic plans, such as 9MB")
    measure: str | None = _option(
        None, "Size that --budget limits: memory (default), file, or token (bytes read per token)"
    )
    backend: str = _option(
        "auto", "Arithmetic of the gate: auto (the serving kernels), reference, simulate, cpu or gpu"
    )
    format: str = _option(
        "auto", "Checkpoint format: auto, compressed-tensors, llm-compressor or deepseek-fp8"
    )
    pack: bool = _option(False, "Also write packed.bin in the CPU kernels' layout")
    gate: bool = _option(True, "Evaluate the result on held-out text")
    timing: bool | None = _option(None, "Serve both models and time them; default: same as --gate")
    check_memory: bool = _option(True, "Refuse to begin with too little memory or disk")
    max_tokens: int | None = _option(None, "Held-out tokens to evaluate; default: about 16,384", minimum=1)
    estimate: bool = _option(False, "Print time, memory and disk that the run takes, and exit")

    def __post_init__(self) -> None:
        check(self)


@app.command(
    epilog="Examples:  farthing compress -o small  |  farthing compress ./model --recipe int4 -o out "
    "--max-drop 1.5%  |  farthing compress ./model --recipe auto -o out --budget 2.5MB --measure token"
)
@with_options(options=CompressOptions)
def compress(
    options: dict[str, Any],
    show: Annotated[bool, typer.Option("--list", help="List the recipes and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compress MODEL layer by layer; a killed run resumes. Writes report.json and report.html to OUT.

    Exit codes: 0 done; 1 unexpected error; 2 invalid input; 3 too little text to decide --max-drop;
    4 worse than --max-drop; 5 read or write failed (the same command resumes).
    """
    if show:
        _print_recipes(as_json)
        return
    with errors_as_one_line("run the same command to resume"):
        flags = CompressOptions(**options)
        if flags.out is None and not flags.estimate:
            raise typer.BadParameter("expected an output directory", param_hint="--out")
        found = _run(flags, flags.out or Path())
    if flags.estimate and not as_json:
        typer.echo(str(found))
        return
    _print(found.to_json(), as_json)
    verdict: Verdict | None = getattr(found, "verdict", None)
    if verdict is not None:
        exit_on_verdict(verdict.answer, str(verdict))


def _run(flags: CompressOptions, out: Path) -> Outcome | Estimate:
    """Compress, then serve both models to time them, with both in memory; or estimate what that takes."""
    # Torch's threads otherwise wait for each other in busy loops after every small op, and with fewer free
    # cores than threads that takes many times the work itself. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Every expert's number of tokens is another shape, and oneDNN keeps the buffers of 1,024 shapes: 0.8 GB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    from farthing.compress import api
    from farthing.compress.api import parse_share
    from farthing.compress.recipe import default_recipe
    from farthing.compress.report import pack_for_cpu, serving_figures

    limit = parse_share("max-drop", flags.max_drop) if flags.max_drop is not None else None
    named = _recipe(flags, flags.recipe, limit) if flags.recipe else None  # refused before a download
    options = api.Options(
        flags.calibration,
        flags.data,
        limit,
        flags.backend,
        max_tokens=flags.max_tokens,
        export=flags.format,
        gate=flags.gate,
        check_memory=flags.check_memory,
    )
    keep_freed_memory()
    model = find_model(flags.model)
    recipe = named or _recipe(flags, default_recipe(model.path), limit)
    if flags.estimate:
        from farthing.compress.estimate import estimate

        tokens = (flags.max_tokens or api.GATE_TOKENS) * flags.gate
        return estimate(model.path, out, recipe, flags.format, tokens)
    if model.absent:
        api.check_before_download(model.path, out, recipe, options)
    source = model.fetch()
    timing = flags.gate if flags.timing is None else flags.timing
    with step_progress("compressing") as progress:
        served = serving_figures(source) if timing else None
        outcome = api.compress(source, out, recipe, options, progress, served)
        if flags.pack:
            pack_for_cpu(out)
    return outcome


def _recipe(options: CompressOptions, name: str, limit: float | None) -> Recipe:
    """The named recipe with the command line's overrides."""
    from farthing.compress.recipe import from_json, load_recipe

    chosen = load_recipe(name)
    _refuse_unread(options, chosen)
    limits = {"budget_bytes": options.budget, "measure": options.measure}
    limits = {k: v for k, v in limits.items() if v is not None}
    if limits:
        read = from_json({"scheme": chosen.scheme} | limits, chosen.name, "the command line")
        chosen = replace(chosen, **{k: getattr(read, k) for k in limits})
    if limit is not None and (chosen.scheme == "auto" or chosen.adaptive):
        chosen = replace(chosen, max_drop=limit)
    return chosen


def _refuse_unread(options: CompressOptions, chosen: Recipe) -> None:
    """Raise ValueError for an option that this recipe, without a gate if there is none, does not read."""
    for flag, asked in (("--budget", options.budget), ("--measure", options.measure)):
        if asked is not None and chosen.scheme != "auto":
            raise ValueError(f"{flag}: got {asked!r} with recipe {chosen.name!r}; expected --recipe auto")
    if options.gate:
        return
    held_out = options.calibration is None and chosen.adaptive  # calibrates on held-out text
    excluded = options.calibration is None and chosen.needs_data  # text that calibration leaves out
    unread = {
        "--max-drop": (options.max_drop, chosen.scheme == "auto" or chosen.adaptive),
        "--data": (options.data, excluded),
        "--max-tokens": (options.max_tokens, held_out),
        "--backend": (None if options.backend == "auto" else options.backend, False),
    }
    for flag, (value, read) in unread.items():
        if value is not None and not read:
            said = str(value) if isinstance(value, Path) else value
            raise ValueError(
                f"{flag}: got {said!r} with recipe {chosen.name!r} and --no-gate; expected no --no-gate"
            )


def _print(document: dict[str, Any], as_json: bool) -> None:

    if as_json:
        print(to_json(document))
        return
    for name, value in document.items():
        typer.echo(f"{name:>18}  {value}")


def _print_recipes(as_json: bool) -> None:
    from farthing.compress.recipe import known_recipes

    if as_json:
        print(json.dumps({name: r.to_json() for name, r in known_recipes().items()}))
        return
    for name, recipe in known_recipes().items():
        typer.echo(f"{name:>18}  {_fields(recipe)}")


def _fields(chosen: Any) -> str:
    """The fields that differ from their defaults, and always the first one that says what is done."""
    said = []
    for field in fields(chosen):
        value = getattr(chosen, field.name)
        if is_dataclass(value):
            said.append(f"{field.name} ({_fields(value)})")
        elif field.name in ("scheme", "pattern") or (field.name != "name" and value != field.default):
            said.append(f"{field.name} {value}")
    return ", ".join(said)
