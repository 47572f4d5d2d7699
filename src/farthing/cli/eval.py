"""`farthing eval`: evaluate a model, or compare it with another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farthing.cli.exits import errors_as_one_line, exit_on_verdict
from farthing.config import Quantization

if TYPE_CHECKING:
    from farthing.compress.evaluate import Verdict

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Served:
    """How a model is loaded to be judged."""

    backend: str
    quantization: Quantization | None


@app.command(
    name="eval",
    epilog="Examples:  farthing eval  |  farthing eval ./model --data text.jsonl --json  |  "
    "farthing eval ./model --against ./model-int4 --max-drop 1.5%  |  "
    "farthing eval ./model --against ./model --quantization int4",
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A directory, a hub id, `mite`, or an .onnx image classifier."),
    ] = "mite",
    against: Annotated[str | None, typer.Option(help="Model B to compare with MODEL.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines with 'text' or 'ids'; for .onnx, an .npz of 'images' and 'labels'."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Maximum perplexity increase with --against; exit 4 if exceeded, 3 if undecided."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Maximum context length in tokens.")] = 1024,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Approximate number of tokens to evaluate.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, gpu or torch.")] = "auto",
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Round dense weights while loading, as `serve` does; with --against, those of B."),
    ] = None,
    simulate: Annotated[
        bool, typer.Option(help="Use reference ops with the checkpoint's activation rounding.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Perplexity, bits per byte and MTP acceptance on held-out text; with --against, B compared with A.

    For two .onnx image classifiers: top-1 of both and the paired interval of the difference.
    Exit codes: 0 done; 1 unexpected error; 2 invalid input; 3 too little text to decide --max-drop;
    4 worse than --max-drop; 5 read failed.
    """
    from farthing.compress.gate import parse_share

    with errors_as_one_line():
        limit = parse_share("max-drop", max_drop) if max_drop is not None else None
        if model.endswith(".onnx"):
            _vision(Path(model), against, data, limit, as_json)
            return
        if quantization is not None and simulate:
            raise ValueError(f"quantization: got {quantization!r} with --simulate; expected one of them")
        served = Served("simulate" if simulate else backend, quantization)
        document, verdict = _measure(model, against, data, limit, (window, max_tokens), served)
    _print(document, as_json)
    if verdict is not None:
        exit_on_verdict(verdict.answer, str(verdict))


def _measure(
    model: str,
    against: str | None,
    data: Path | None,
    limit: float | None,
    cut: tuple[int, int | None],
    served: Served,
) -> tuple[dict[str, object], Verdict | None]:
    """The document to print, and the verdict if a limit is set. cut: (window, maximum tokens)."""
    from farthing.cli.progress import token_progress
    from farthing.compress import evaluate as ev
    from farthing.compress.corpus import load_corpus
    from farthing.compress.gate import compare_in_turn, held_out_sample, load_for
    from farthing.hub import resolve_model
    from farthing.model import ModelConfig

    path = resolve_model(model)
    config = ModelConfig.from_directory(path)
    corpus = load_corpus(data or held_out_sample(), path, config, cut[0], cut[1])
    if against is None:
        with token_progress("measuring", corpus.tokens) as advance:
            judged = load_for(path, served.backend, quantization=served.quantization)
            return asdict(ev.evaluate(judged, corpus, progress=advance)), None
    with token_progress("comparing", 2 * corpus.tokens) as advance:
        backends = (served.backend, served.backend)
        result = compare_in_turn(path, resolve_model(against), corpus, backends, advance, served.quantization)
    verdict = result.verdict(limit) if limit is not None else None
    document: dict[str, object] = result.to_json()
    if verdict is not None:
        document |= {"verdict": verdict.answer, "max_drop": limit, "tokens_needed": verdict.tokens_needed}
    return document, verdict


def _vision(a: Path, against: str | None, data: Path | None, limit: float | None, as_json: bool) -> None:
    from farthing.compress.vision import top1_of_files

    if against is None or not against.endswith(".onnx"):
        raise typer.BadParameter(f"--against: got {against!r}; expected a second .onnx file")
    if data is None or data.suffix != ".npz":
        given = None if data is None else str(data)
        raise typer.BadParameter(f"--data: got {given!r}; expected an .npz of 'images' and 'labels'")
    try:
        top = top1_of_files(a, Path(against), data)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    verdict = None if limit is None else top.verdict(limit)
    difference = {"difference": top.b - top.a, "interval": [top.difference.low, top.difference.high]}
    document = {"top1_a": top.a, "top1_b": top.b, **difference, "images": top.images}
    _print(document if verdict is None else document | {"verdict": verdict, "max_drop": limit}, as_json)
    if verdict is not None:
        exit_on_verdict(verdict)


def _print(document: dict[str, object], as_json: bool) -> None:
    from farthing.files import to_json

    if as_json:
        print(to_json(document))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in document.items():
        table.add_row(name, f"{value:.5g}" if isinstance(value, float) else str(value))
    Console().print(table)
