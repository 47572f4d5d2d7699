"""`farthing compress`: write a smaller, faster checkpoint and check its accuracy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing.cli.exits import errors_as_one_line, exit_on_verdict

if TYPE_CHECKING:
    from farthing.compress.api import Options, Outcome
    from farthing.compress.recipe import Prune, Recipe

app = typer.Typer()


@app.command(
    epilog="Examples:  farthing compress -o small  |  farthing compress ./model --recipe int4-gptq -o out "
    "--max-drop 1.5%  |  farthing compress ./model --recipe auto -o out --budget 2.5MB --measure token"
)
def compress(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or `mite`.")] = "mite",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output directory.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe name (see --list) or .yaml file.")] = "int8",
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration text: JSON lines with 'text' or 'ids'.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Held-out text for the accuracy gate, JSON lines.")
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Maximum perplexity increase (0.3%); exit 4 if exceeded, 3 if undecided."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Size limit for automatic plans, such as 9MB.")] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="Size that --budget limits: memory (default), file, or token (bytes read per token)."
        ),
    ] = None,
    observer: Annotated[
        str | None, typer.Option(help="Calibration observer: kl, mse, percentile or minmax.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Arithmetic of the gate: auto (the serving kernels), reference, simulate, cpu or gpu."
        ),
    ] = "auto",
    export: Annotated[
        str,
        typer.Option(
            "--format", help="Checkpoint format: auto, compressed-tensors, llm-compressor or deepseek-fp8."
        ),
    ] = "auto",
    pack: Annotated[bool, typer.Option(help="Also write packed.bin in the CPU kernels' layout.")] = False,
    gate: Annotated[bool, typer.Option(help="Evaluate the result on held-out text.")] = True,
    timing: Annotated[
        bool | None,
        typer.Option("--timing/--no-timing", help="Serve both models and time them. Default: as --gate."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens to evaluate. Default: about 16,384.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the recipes and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compress MODEL layer by layer; a killed run resumes. Writes report.json and report.html to OUT.

    Exit codes: 0 done; 1 unexpected error; 2 invalid input; 3 too little text to decide --max-drop;
    4 worse than --max-drop; 5 read or write failed (the same command resumes).
    """
    from farthing.compress.api import Options
    from farthing.compress.gate import parse_share

    if show:
        _print_recipes(as_json)
        return
    if out is None:
        raise typer.BadParameter("expected an output directory", param_hint="--out")
    with errors_as_one_line(resumes=True):
        limit = parse_share("max-drop", max_drop) if max_drop is not None else None
        chosen = _recipe(recipe, limit, {"observer": observer, "budget_bytes": budget, "measure": measure})
        options = Options(calibration, data, limit, backend, max_tokens=max_tokens, export=export, gate=gate)
        outcome = _run(model, out, chosen, options, gate if timing is None else timing, pack)
    _print(outcome.to_json(), as_json)
    if outcome.verdict is not None:
        exit_on_verdict(outcome.verdict.answer, str(outcome.verdict))


def _run(model: str, out: Path, recipe: Recipe, options: Options, timing: bool, pack: bool) -> Outcome:
    """Compress, then serve both models to time them, with both in memory."""
    from farthing.cli.progress import step_progress
    from farthing.compress import api
    from farthing.compress.serving import pack_for_cpu, serving_figures
    from farthing.hub import resolve_model

    source = resolve_model(model)
    with step_progress("compressing") as progress:
        served = serving_figures(source) if timing else None
        outcome = api.compress(source, out, recipe, options, progress, served)
        if pack:
            pack_for_cpu(out)
    return outcome


def _recipe(name: str, limit: float | None, given: dict[str, str | None]) -> Recipe:
    """The recipe with the command line's overrides."""
    from farthing.compress.recipe import from_json, load_recipe

    chosen = load_recipe(name)
    fields = {k: v for k, v in given.items() if v is not None}
    if fields:
        read = from_json({"scheme": chosen.scheme} | fields, name, "the command line")
        chosen = replace(chosen, **{k: getattr(read, k) for k in fields})
    if limit is not None and (chosen.scheme == "auto" or chosen.adaptive):
        chosen = replace(chosen, max_drop=limit)
    return chosen


def _print(document: dict[str, Any], as_json: bool) -> None:
    from farthing.files import to_json

    if as_json:
        print(to_json(document))
        return
    for name, value in document.items():
        typer.echo(f"{name:>18}  {value}")


def _print_recipes(as_json: bool) -> None:
    from farthing.compress.recipe import RECIPES, Recipe

    if as_json:
        print(json.dumps({name: r.to_json() for name, r in RECIPES.items()}))
        return
    for name, recipe in RECIPES.items():
        typer.echo(f"{name:>18}  {_fields(recipe, Recipe(''))}")


def _fields(given: Recipe | Prune, defaults: Recipe | Prune) -> str:
    """The fields that differ from their defaults, and always `scheme`."""
    from farthing.compress.recipe import Prune

    said = []
    for name in given.__dataclass_fields__:
        value = getattr(given, name)
        if isinstance(value, Prune):
            said.append(f"prune ({_fields(value, Prune())})")
        elif name in ("scheme", "pattern") or (name != "name" and value != getattr(defaults, name)):
            said.append(f"{name} {value}")
    return ", ".join(said)
