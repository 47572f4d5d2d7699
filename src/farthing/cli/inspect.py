"""`farthing inspect`: per-token cost of a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farthing.cli.exits import errors_as_one_line

if TYPE_CHECKING:
    from farthing.model import ModelConfig
    from farthing.model.inspect import ModelCost

app = typer.Typer(add_completion=False)
CONTEXTS = (2048, 32768, 131072)  # tokens


@app.command(
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
    from farthing.model.inspect import context_cost

    with errors_as_one_line():
        config, cost, path = _cost(model)
        if prompts is not None and path is None:
            raise ValueError(f"{model} is a published configuration without weights; --prompts needs them")
    contexts = [context_cost(config, n) for n in CONTEXTS]
    report = None
    if prompts is not None:
        assert path is not None
        from farthing.model import load
        from farthing.model.inspect import routing_report
        from farthing.ops import select
        from farthing.tokenizer_file import read_tokenizer

        tokenizer = read_tokenizer(path / "tokenizer.json")
        lines = prompts.read_text(encoding="utf-8").splitlines()
        report = routing_report(load(path, select(backend)), [tokenizer.encode(line).ids for line in lines])
    if as_json:
        document = asdict(cost) | {"compute_saved": cost.compute_saved}
        document["contexts"] = [asdict(c) for c in contexts]
        print(json.dumps(document | {"routing": asdict(report) if report else None}))
        return
    from farthing.cli.tables import print_contexts, print_cost, print_routing

    print_cost(model, cost)
    print_contexts(contexts, config.index_topk)
    if report is not None:
        print_routing(report)


def _cost(model: str) -> tuple[ModelConfig, ModelCost, Path | None]:
    """Cost of a checkpoint, or of a published configuration (path is None)."""
    from farthing.hub import resolve_model
    from farthing.model import ModelConfig
    from farthing.model.inspect import checkpoint_cost, model_cost
    from farthing.model.load import parameter_shapes
    from farthing.planner.footprint import stored_by_config
    from farthing.planner.published import closest, file_bytes, published_config

    raw = None if Path(model).expanduser().exists() else published_config(model)
    if raw is not None:
        config, stored_of = ModelConfig.from_json(raw), stored_by_config(raw)
        shapes = dict(parameter_shapes(config))
        return config, model_cost(config, lambda n: file_bytes(stored_of(n), shapes[n])), None
    try:
        path = resolve_model(model)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; {closest(model)}") from None
    return ModelConfig.from_directory(path), checkpoint_cost(path), path
