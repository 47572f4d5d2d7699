"""`farthing pack`: a model in the CPU kernels' layout, for `farthing serve --packed`."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from farthing.cli.errors import one_line_errors
from farthing.cli.exits import errors_as_one_line
from farthing.config import Quantization

app = typer.Typer(add_completion=False)

EPILOG = """
Example:

  farthing pack ./DeepSeek-V3 -o v3-int4.packed --quantization int4

  farthing serve ./DeepSeek-V3 --packed v3-int4.packed
"""


@app.command(epilog=EPILOG)
def pack(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    quantization: Annotated[
        Quantization | None, typer.Option(help="Format to round dense and FP8 weights to.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: all CPUs.")] = None,
) -> None:
    """Write MODEL to one file that replicas map instead of packing its weights at every start.

    It takes the memory of two packed layers. A run that was interrupted resumes after its last layer. Exits
    with 5 if a file could not be read or written.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    with one_line_errors("pack"), errors_as_one_line("run the same command to resume"):
        if not out.parent.is_dir():
            raise ValueError(f"out: got {str(out)!r}; expected a file in an existing directory")
        from farthing.hub import resolve_model
        from farthing.model.pack import pack_checkpoint
        from farthing.ops.cpu.packed_file import PackedFile

        began = time.perf_counter()
        pack_checkpoint(resolve_model(model), out, quantization, threads)
        typer.echo(f"{out}: {out.stat().st_size:,} bytes in {time.perf_counter() - began:.1f} s")
        if isa := PackedFile(out).sparse_for:
            typer.echo(f"zero blocks are left out where {isa} kernels are faster without them")
