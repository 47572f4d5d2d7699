"""`farthing export`: writes a model as a GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farthing.cli.errors import errors_as_one_line, one_line_errors
from farthing.cli.tables import step_progress, token_progress
from farthing.hub import find_model, resolve_model
from farthing.model.config import ModelConfig

app = typer.Typer(add_completion=False)
_WINDOW, _TOKENS = 512, 4096  # of held-out text for the comparison


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
            help="Type for dense and FP8 matrices: q8_0, q5_0, q4_0, iq4_nl, mxfp4 or bf16; below 8 bits, "
            "attention, embedding and head get q8_0. Default: that of their own values.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="If values were rounded, measure the file's KL divergence from MODEL.")
    ] = True,
) -> None:
    """Write MODEL to one GGUF file, tensor by tensor; quantized matrices keep their values where they can.

    Exit codes: 0 done; 1 unexpected error; 2 invalid input; 5 read or write failed.
    """
    with one_line_errors("export"), errors_as_one_line():
        import torch

        from farthing.compress.api import compare_in_turn, held_out_sample
        from farthing.compress.evaluate import load_corpus
        from farthing.compress.gguf import check_export, export_gguf

        torch.set_num_threads(1)  # of pieces that fit a core's cache, others would mostly wait
        found = find_model(model)
        check_export(ModelConfig.from_directory(found.path), out, kind)
        path = found.fetch()
        with step_progress("exporting") as progress:
            kept = export_gguf(path, out, kind, progress)
        typer.echo(f"{out}: {out.stat().st_size:,} bytes")
        for name, figures in kept.items():
            typer.echo(f"{name:>8}  {figures}")
        if not compare or all(figures.exact == figures.matrices for figures in kept.values()):
            return
        corpus = load_corpus(held_out_sample(), path, ModelConfig.from_directory(path), _WINDOW, _TOKENS)
        with token_progress("comparing", 2 * corpus.tokens) as advance:
            quality = compare_in_turn(path, resolve_model(out), corpus, ("exact", "exact"), advance)
        if "IQ4_NL" in kept and kept["IQ4_NL"].exact < kept["IQ4_NL"].matrices and kind is None:
            typer.echo(
                "The fitted 4-bit values were rounded again; compress with --format llm-compressor, "
                "whose values become q4_0 as they are."
            )
        typer.echo(
            f"KL divergence from {model}: {quality.kl:.4f} nats per token over {quality.tokens:,} tokens of "
            f"Python; the same token is likeliest in {quality.greedy_agreement:.1%}"
        )
