"""`farthing doctor`: what this machine supports and what to install."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from farthing.doctor import Diagnosis

app = typer.Typer(add_completion=False)

_MARKS = {"ok": "[green]✓[/]", "info": "[dim]·[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]"}


@app.command(
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
