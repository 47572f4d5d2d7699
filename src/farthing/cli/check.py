"""Commands that look at a model or a machine without serving: `check`, `inspect`, `pack` and `doctor`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farthing.cli.errors import errors_as_one_line, log_lines, one_line_errors
from farthing.cli.tables import print_contexts, print_cost, print_routing, step_progress
from farthing.config import Quantization
from farthing.hub import resolve_model, resolve_shapes
from farthing.model import ModelConfig, parameter_shapes
from farthing.model.inspect import checkpoint_cost, context_cost, model_cost, routing_report
from farthing.model.load import load
from farthing.model.pack import pack_checkpoint
from farthing.ops.select import select
from farthing.planner.estimate import file_bytes, published_config, unknown
from farthing.planner.footprint import stored_by_config

if TYPE_CHECKING:
    from farthing.doctor import Diagnosis
    from farthing.model.inspect import ModelCost


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

    from farthing.doctor.model import check as findings

    try:
        ops = select(backend, dtype=torch.float32)
        path = resolve_model(model)
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    failed = False
    for f in findings(path, ops, layers):
        typer.echo(f"{f.state:>7}  {f.name}: {f.detail} ({f.seconds:.1f} s)")
        failed |= f.state == "failed"
    raise typer.Exit(1 if failed else 0)


# `farthing pack`: a model in the CPU kernels' layout, for `farthing serve --packed`.

pack_app = typer.Typer(add_completion=False)

EPILOG = """
Example:

  farthing pack ./DeepSeek-V3 -o v3-int4.packed --quantization int4

  farthing serve ./DeepSeek-V3 --packed v3-int4.packed
"""


@pack_app.command(epilog=EPILOG)
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
    log_lines()
    with one_line_errors("pack"), errors_as_one_line("run the same command to resume"):
        if not out.parent.is_dir():
            raise ValueError(f"out: got {str(out)!r}; expected a file in an existing directory")
        from farthing.ops.cpu.packed import PackedFile

        began = time.perf_counter()
        path = resolve_model(model)
        with step_progress("packing") as progress:
            pack_checkpoint(path, out, quantization, threads, progress)
        typer.echo(f"{out}: {out.stat().st_size:,} bytes in {time.perf_counter() - began:.1f} s")
        if isa := PackedFile(out).sparse_for:
            typer.echo(f"zero blocks are left out where {isa} kernels are faster without them")


# `farthing inspect`: per-token cost of a model.

inspect_app = typer.Typer(add_completion=False)
CONTEXTS = (2048, 32768, 131072)  # tokens


@inspect_app.command(
    epilog="Examples:  farthing inspect  |  farthing inspect kimi-k2.5  |  "
    "farthing inspect ./DeepSeek-V3 --json  |  farthing inspect --prompts code.txt"
)
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory, a hub id, `mite`, or a published name.")
    ] = "mite",
    prompts: Annotated[
        Path | None, typer.Option(help="Text to measure routing on, one prompt per line.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto, reference, cpu, gpu or torch (for --prompts).")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Parameters, bytes and FLOPs per token, compared with a dense model of the same size."""

    with errors_as_one_line():
        config, cost, path = _cost(model, prompts is not None)
        if prompts is not None and path is None:
            raise ValueError(f"{model} is a published configuration without weights; --prompts needs them")
    contexts = [context_cost(config, n) for n in CONTEXTS]
    report = None
    if prompts is not None:
        assert path is not None
        from farthing.tokenizer_file import read_tokenizer

        tokenizer = read_tokenizer(path / "tokenizer.json")
        lines = prompts.read_text(encoding="utf-8").splitlines()
        report = routing_report(load(path, select(backend)), [tokenizer.encode(line).ids for line in lines])
    if as_json:
        document = asdict(cost) | {"compute_saved": cost.compute_saved}
        document["contexts"] = [asdict(c) for c in contexts]
        print(json.dumps(document | {"routing": asdict(report) if report else None}))
        return

    print_cost(model, cost)
    print_contexts(contexts, config.index.top_k if config.index else None)
    if report is not None:
        print_routing(report)


def _cost(model: str, prompts: bool) -> tuple[ModelConfig, ModelCost, Path | None]:
    """Cost of a checkpoint, whose values `prompts` need, or of a published configuration (path is None)."""

    raw = None if Path(model).expanduser().exists() else published_config(model)
    if raw is not None:
        config, stored_of = ModelConfig.from_json(raw), stored_by_config(raw)
        shapes = dict(parameter_shapes(config))
        return config, model_cost(config, lambda n: file_bytes(stored_of(n), shapes[n])), None
    try:
        path = resolve_model(model) if prompts else resolve_shapes(model)
    except FileNotFoundError as error:
        raise unknown(model, error) from None
    return ModelConfig.from_directory(path), checkpoint_cost(path), path


# `farthing doctor`: what this machine supports and what to install.

doctor_app = typer.Typer(add_completion=False)

_MARKS = {"ok": "[green]✓[/]", "info": "[dim]·[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]"}


@doctor_app.command(
    epilog="Examples:  farthing doctor  |  farthing doctor --no-measure --json.  "
    "Exit status 1: serving will not work here."
)
def doctor(
    measure: Annotated[bool, typer.Option(help="Measure memory bandwidth (takes a second).")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Instruction sets, cores, memory bandwidth, GPU, compilers, extras, and what to install."""
    from rich.console import Console

    from farthing.doctor import examine

    with Console(stderr=True).status("examining this machine"):
        report = examine(measure)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        _print(report)
    raise typer.Exit(0 if report.healthy else 1)


def _print(report: Diagnosis) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    group = ""
    for check in report.checks:
        if check.group != group and group:
            table.add_row()
        shown = escape(check.detail) + (f"\n[cyan]→ {escape(check.advice)}[/]" if check.advice else "")
        table.add_row(check.group if check.group != group else "", _MARKS[check.status], check.name, shown)
        group = check.group
    Console().print(table)
