"""`farthing train`: trains the embedded reference model on this interpreter's own standard library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train the embedded reference model.")


@app.callback()
def _root() -> None:
    """Train models."""


@app.command()
def reference(
    out: Annotated[Path, typer.Option(help="Folder of the run: state, record, checkpoint.")] = Path(
        "runs/reference"
    ),
    minutes: Annotated[
        float | None, typer.Option(help="Active minutes of each thread; the schedule fits them.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Length in tokens, instead of minutes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of .py files instead of the standard library.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the recipe, NAME=VALUE (may repeat).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Train a small DeepSeek-V3 that completes Python; Ctrl-C saves, --resume continues.

    Examples:

      farthing train reference --minutes 80 --threads 2

      farthing train reference --resume --minutes 120

      farthing train reference --out /tmp/quick --tokens 200000 --set muon_lr=0.03
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # one a matrix shape
    from farthing.train.reference import train_reference

    if minutes is None and tokens is None:
        minutes = 90.0
    try:
        summary = train_reference(out, minutes, tokens, resume, data, device, threads, seed, settings or [])
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if summary is not None and as_json:
        import json

        typer.echo(json.dumps(summary))
