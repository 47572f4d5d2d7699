"""`farthing inspect`: what a token of this model costs, before it is served."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command(
    epilog="Examples:  farthing inspect  |  farthing inspect ./DeepSeek-V3 --json  |  "
    "farthing inspect --prompts code.txt"
)
def inspect(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or `mite`.")] = "mite",
    prompts: Annotated[
        Path | None, typer.Option(help="Measure routing on this text, a prompt a line.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu or gpu (for --prompts).")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Parameters, bytes and FLOPs a token, against a dense model of the same size; measured routing."""
    from farthing.hub import resolve_model
    from farthing.model.inspect import checkpoint_cost

    path = resolve_model(model)
    cost = checkpoint_cost(path)
    report = None
    if prompts is not None:
        from tokenizers import Tokenizer

        from farthing.model import load
        from farthing.model.inspect import routing_report
        from farthing.ops import select

        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        lines = prompts.read_text(encoding="utf-8").splitlines()
        report = routing_report(load(path, select(backend)), [tokenizer.encode(line).ids for line in lines])
    if as_json:
        document = asdict(cost) | {"compute_saved": cost.compute_saved}
        print(json.dumps(document | {"routing": asdict(report) if report else None}))
        return
    from farthing.cli.tables import print_cost, print_routing

    print_cost(model, cost)
    if report is not None:
        print_routing(report)
