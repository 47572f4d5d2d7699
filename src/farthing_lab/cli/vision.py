"""`farthing vision`: compare two image classifiers in ONNX by their top-1 accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farthing.cli.errors import errors_as_one_line, exit_on_verdict
from farthing.files import to_json

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example:  farthing vision resnet50.onnx resnet50-int8.onnx --data images.npz --max-drop 1%"
)
def main(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference, an .onnx file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The .onnx file to compare with it.")],
    data: Annotated[Path, typer.Option(help="An .npz of 'images' and 'labels'.")],
    max_drop: Annotated[
        str | None, typer.Option(help="Maximum drop of top-1; exit 4 if exceeded, 3 if undecided.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Top-1 accuracy of both and the paired interval of the difference."""
    from farthing.compress.api import parse_share
    from farthing_lab.vision.module import top1_of_files

    with errors_as_one_line():
        limit = parse_share("max-drop", max_drop) if max_drop is not None else None
        top = top1_of_files(a, b, data)
    difference = {"difference": top.b - top.a, "interval": [top.difference.low, top.difference.high]}
    document: dict[str, object] = {"top1_a": top.a, "top1_b": top.b, **difference, "images": top.images}
    verdict = None if limit is None else top.verdict(limit)
    if verdict is not None:
        document |= {"verdict": verdict, "max_drop": limit}
    if as_json:
        print(to_json(document))
    else:
        for name, value in document.items():
            print(f"{name:>12} {value:.5g}" if isinstance(value, float) else f"{name:>12} {value}")
    if verdict is not None:
        exit_on_verdict(verdict)
