"""`farthing compress`: a smaller, faster checkpoint, checked for accuracy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from farthing.compress.recipe import Recipe

app = typer.Typer()


@app.command(
    epilog="Examples:  farthing compress -o small  |  farthing compress ./model --recipe int4-gptq -o out "
    "--max-drop 1.5%  |  farthing compress ./model --recipe mine.yaml -o out --calibration text.jsonl --json"
)
def compress(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or `reference`.")] = "reference",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The directory to write.")] = None,
    recipe: Annotated[str, typer.Option(help="A recipe by name (see --list), or a .yaml file.")] = "int8",
    calibration: Annotated[Path | None, typer.Option(help="JSON lines with 'text' or 'ids'.")] = None,
    data: Annotated[Path | None, typer.Option(help="Held-out JSON lines for the accuracy gate.")] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Exit 1 if perplexity rises by more (0.3%), 3 if the sample cannot tell."),
    ] = None,
    observer: Annotated[str | None, typer.Option(help="Force kl, mse, percentile or minmax.")] = None,
    backend: Annotated[
        str, typer.Option(help="The gate's arithmetic: simulate, reference, cpu, gpu or auto.")
    ] = "simulate",
    export: Annotated[str, typer.Option("--format", help="compressed-tensors or deepseek-fp8.")] = (
        "compressed-tensors"
    ),
    pack: Annotated[bool, typer.Option(help="Also write the CPU kernels' own layout, packed.bin.")] = False,
    gate: Annotated[bool, typer.Option(help="Measure the result on held-out text.")] = True,
    timing: Annotated[
        bool | None,
        typer.Option("--timing/--no-timing", help="Serve both models and time them; without it: as --gate."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens to measure on, about 16,384.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the recipes and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compress MODEL layer by layer; a killed run resumes. Writes report.json and report.html beside it."""
    from farthing.cli.progress import step_progress
    from farthing.compress import api
    from farthing.compress.gate import parse_share
    from farthing.compress.serving import pack_for_cpu, serving_figures
    from farthing.engine.resolve import resolve_model

    if show:
        _print_recipes(as_json)
        return
    if out is None:
        raise typer.BadParameter("expected a directory to write", param_hint="--out")
    try:
        limit = parse_share("max-drop", max_drop) if max_drop is not None else None
        chosen = _recipe(recipe, observer, limit)
        options = api.Options(
            calibration, data, limit, backend, max_tokens=max_tokens, export=export, gate=gate
        )
        source = resolve_model(model)
        with step_progress("compressing") as progress:
            # Serving holds both models in memory: who forgoes the gate may not afford that.
            served = serving_figures(source) if (gate if timing is None else timing) else None
            outcome = api.compress(source, out, chosen, options, progress, served)
            if pack:
                pack_for_cpu(out)
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    _print(outcome.to_json(), as_json)
    if outcome.verdict is not None and outcome.verdict.answer != "pass":
        typer.echo(str(outcome.verdict), err=True)
        raise typer.Exit(1 if outcome.verdict.answer == "fail" else 3)


def _recipe(name: str, observer: str | None, limit: float | None) -> Recipe:
    """The recipe with what the command line changes in it."""
    from farthing.compress.recipe import from_json, load_recipe

    chosen = load_recipe(name)
    if observer is not None:
        chosen = replace(chosen, observer=from_json({"observer": observer}, name, "--observer").observer)
    if limit is not None and (chosen.scheme == "auto" or chosen.adaptive):
        chosen = replace(chosen, max_drop=limit)
    return chosen


def _print(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document))
        return
    for name, value in document.items():
        typer.echo(f"{name:>18}  {value}")


def _print_recipes(as_json: bool) -> None:
    from farthing.compress.recipe import RECIPES

    recipes = {name: r.to_json() for name, r in RECIPES.items()}
    if as_json:
        print(json.dumps(recipes))
        return
    for name, fields in recipes.items():
        text = ", ".join(f"{k} {v}" for k, v in fields.items() if v and k not in ("name", "damp", "window"))
        typer.echo(f"{name:>18}  {text}")
