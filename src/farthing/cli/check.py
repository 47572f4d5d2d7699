"""`farthing check`: check that a model directory works on this machine, in about a minute."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Examples:  farthing check ./DeepSeek-V3.2  |  farthing check ./GLM-4.7-Flash --layers 4")
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub id, or `mite`.")] = "mite",
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of layers to run. Default: the dense layers and one MoE layer, or fewer if those "
            "take more than 12 GiB in float32.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, gpu or torch.")] = "reference",
) -> None:
    """Check configuration, tokenizer and first layers; compare logits with transformers if installed."""
    import torch

    from farthing.engine.check import check as findings
    from farthing.hub import resolve_model
    from farthing.ops import select

    try:
        path, ops = resolve_model(model), select(backend, dtype=torch.float32)
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    failed = False
    for f in findings(path, ops, layers):
        typer.echo(f"{f.state:>7}  {f.name}: {f.detail} ({f.seconds:.1f} s)")
        failed |= f.state == "failed"
    raise typer.Exit(1 if failed else 0)
