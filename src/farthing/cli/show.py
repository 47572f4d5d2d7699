"""`farthing show`: what a model is, and how it would fit this machine, before anything is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from farthing import hub
from farthing.catalogue import catalogue, hub_id
from farthing.checkpoint.reader import method_of, read_config
from farthing.cli.errors import one_line_errors
from farthing.memory import available_memory, gigabytes, machine_memory
from farthing.model import ModelConfig
from farthing.planner.estimate import published_config
from farthing.planner.fit import fit
from farthing.planner.footprint import quantization_of

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a short name, or a name of `farthing list`.")
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
show_app = typer.Typer(add_completion=False)


@show_app.command()
def show(model: _Model, as_json: _Json = False) -> None:
    """What MODEL is, and how it would fit this machine. Of a hub id only its configuration is downloaded, of
    a short name nothing.
    """
    with one_line_errors("show"):
        shown = _shown(model)
    if as_json:
        typer.echo(json.dumps(shown))
        return
    width = max(map(len, shown))
    for name, value in shown.items():
        typer.echo(f"{name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")


def _shown(model: str) -> dict[str, Any]:
    name = hub_id(model)
    here = Path(model).expanduser().exists() or any(
        each.model == hub.without_file(name) for each in hub.cached()
    )
    packaged = None if here else published_config(model)
    if packaged is None:
        path = hub.resolve_config(model)
        return _described(name, path, str(path))
    with TemporaryDirectory() as folder:
        path = Path(folder) / model.lower()
        path.mkdir()
        (path / "config.json").write_text(json.dumps(packaged), encoding="utf-8")
        return _described(name, path, "not downloaded") | _download(model)


def _download(model: str) -> dict[str, Any]:
    """What `farthing run` would download of a name of the catalogue, and whether it fits this machine."""
    if (entry := catalogue().get(model.lower())) is None:
        return {}
    memory = machine_memory()
    file = entry.best(memory)
    fits = "" if entry.fits(file, memory) else "no: "
    return {
        "weights": file.type,
        "download": f"about {gigabytes(file.size)}" + (", gated" if entry.gated else ""),
        "fit": f"{fits}a conversation takes {gigabytes(entry.memory(file))} of {gigabytes(memory)}",
    }


def _described(name: str, path: Path, where: str) -> dict[str, Any]:
    raw = read_config(path)
    config = ModelConfig.from_json(raw)
    experts = config.n_routed_experts or 0
    weights = method_of(quantization_of(raw))
    try:
        found = fit(path, available_memory())
        fits, weights = str(found), found.stored
    except ValueError as error:
        fits = f"no: {str(error).partition('; ')[0]}"
    return {
        "model": name,
        "path": where,
        "type": config.model_type,
        "weights": weights,
        "layers": config.num_hidden_layers,
        "experts": f"{config.num_experts_per_tok} of {experts} per token" if experts else "none",
        "context": config.max_position_embeddings,
        "fit": fits,
    }
