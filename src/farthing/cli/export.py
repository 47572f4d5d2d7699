"""`farthing export`: writes a model as a GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farthing.cli.errors import errors_as_one_line, one_line_errors
from farthing.cli.tables import step_progress
from farthing.hub import find_model
from farthing.model.config import ModelConfig

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Examples:  farthing export ./model model.gguf  |  farthing export ./model model.gguf --type q4_0"
)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf file to write.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Type for dense and FP8 matrices: q8_0, q4_0, iq4_nl, mxfp4 or bf16; of types of 4 bits, "
            "attention, embedding and head get q8_0. Default: that of their own values.",
        ),
    ] = None,
) -> None:
    """Write MODEL to one GGUF file, tensor by tensor; quantized matrices keep their values where they can.

    Exit codes: 0 done; 1 unexpected error; 2 invalid input; 5 read or write failed.
    """
    with one_line_errors("export"), errors_as_one_line():
        import torch

        from farthing.compress.gguf import check_export, export_gguf

        torch.set_num_threads(1)  # of pieces that fit a core's cache, others would mostly wait
        found = find_model(model)
        check_export(ModelConfig.from_directory(found.path), out, kind)
        with step_progress("exporting") as progress:
            kept = export_gguf(found.fetch(), out, kind, progress)
        typer.echo(f"{out}: {out.stat().st_size:,} bytes")
        for name, figures in kept.items():
            typer.echo(f"{name:>8}  {figures}")
