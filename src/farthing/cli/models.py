"""Models on this machine: `pull` downloads one, `list`, `show` and `rm` manage what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from farthing import hub, stores
from farthing.catalogue import catalogue
from farthing.checkpoint.reader import has_config, method_of, read_config
from farthing.cli.errors import Exit, errors_as_one_line, log_lines, one_line_errors
from farthing.cli.offered import all_offers, table
from farthing.cli.tables import size, step_progress
from farthing.config import EngineConfig
from farthing.memory import available_memory, gigabytes, machine_memory
from farthing.model import ModelConfig
from farthing.planner.estimate import published_config
from farthing.planner.fit import fit
from farthing.planner.footprint import quantization_of
from farthing.process import cache_dir

pull_app = typer.Typer(add_completion=False)
_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a short name, or a name of `farthing list`.")
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@pull_app.command(
    epilog="Examples:  farthing pull qwen3-30b-a3b  |  farthing pull deepseek-ai/DeepSeek-V2-Lite-Chat"
)
def pull(
    model: _Model,
    check_memory: Annotated[bool, typer.Option(help="Refuse a model that this machine cannot hold.")] = True,
) -> None:
    """Download the files that serving MODEL reads, into the hub's cache, each compared with its checksum.

    The configuration is read first: what is not served, or does not fit the disk or the memory, is refused
    before the weights. An interrupted download resumes.
    """
    log_lines()
    with one_line_errors("pull"), errors_as_one_line("run the same command to resume"):
        found = hub.find_model(model)
        if check_memory and EngineConfig(model=model).on_this_cpu:
            typer.echo(f"fit: {fit(found.path, available_memory())}")
        files = f"{len(found.absent)} files, {size(found.to_download)}"
        with step_progress("downloading") as progress:
            path = found.fetch(progress)
        typer.echo(f"{files} downloaded to {path}" if found.absent else f"complete in {path}")
    typer.echo(f"farthing run {model}")


# What is on this machine.


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of `farthing list`."""

    model: str
    size: int  # bytes
    type: str
    state: str
    path: str


list_app = typer.Typer(add_completion=False)


@list_app.command("list")
def list_models(as_json: _Json = False) -> None:
    """The models on this machine: of the hub's cache, and of Ollama, LM Studio and llama.cpp."""
    models = list(_listed())
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in models]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "size", "type", "", box=None, pad_edge=False)
    for each in models:
        table.add_row(each.model, size(each.size), each.type, each.state)
    Console().print(table)


def _listed() -> Iterator[Listed]:
    embedded = hub.resolve_model(hub.EMBEDDED)
    yield Listed(hub.EMBEDDED, _bytes_in(embedded), *_state(embedded, whole=True), str(embedded))
    for each in hub.cached():
        state = _state(each.path, each.whole) if has_config(each.path) else ("gguf", _incomplete(each.whole))
        yield Listed(each.model, each.size, *state, str(each.path))
    for other in stores.stored():
        kind = ("gguf", "") if other.path.is_file() else _state(other.path, whole=True)
        yield Listed(other.name, other.size, *kind, str(other.path))


def _state(path: Path, whole: bool) -> tuple[str, str]:
    """(model type, why it cannot be served as it is)."""
    try:
        kind = str(read_config(path).get("model_type"))
    except ValueError:
        return "?", "damaged configuration"
    try:
        hub.judge(path)
    except ValueError:
        return kind, "not served"
    return kind, _incomplete(whole)


def _incomplete(whole: bool) -> str:
    return "" if whole else "incomplete"


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


models_app = typer.Typer(add_completion=False)


@models_app.command("models")
def offered(as_json: _Json = False) -> None:
    """The models that people start with, the most worth having first: each with the file that suits this
    machine, its memory in a conversation, and the speed to expect (an estimate).
    """
    with one_line_errors("models"):
        found = all_offers()
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    from rich.console import Console

    Console().print(table(found))
    typer.echo("farthing run MODEL  |  any other model of the hub: farthing run OWNER/NAME")


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
    name = hub.hub_id(model)
    here = Path(model).expanduser().exists() or any(each.model == _plain(name) for each in hub.cached())
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


def _plain(name: str) -> str:
    """A hub id without the file behind it."""
    return name if Path(name).exists() else name.partition(":")[0]


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


rm_app = typer.Typer(add_completion=False)


@rm_app.command()
def rm(
    model: _Model,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove MODEL from the hub's cache, with the files that were packed of it."""
    with one_line_errors("rm"), errors_as_one_line():
        if program := stores.program_of(model):
            raise ValueError(f"model: got {model!r}, which belongs to {program}; remove it there")
        name = _plain(hub.hub_id(model))
        found = next((each for each in hub.cached() if each.model == name), None)
        if found is None:
            raise FileNotFoundError(
                f"model: got {model!r}; expected a model of the hub's cache, as `farthing list` shows it"
            )
        folders = [found.path.parent / revision for revision in found.revisions]
        packed = [file for each in folders for file in (cache_dir() / "packed").glob(f"{each.name}-*")]
        total = found.size + sum(file.stat().st_size for file in packed)
        if not (yes or typer.confirm(f"remove {name}, {size(total)}?")):
            raise typer.Exit(Exit.INPUT)
        hub.remove_cached(found)
        for file in packed:
            file.unlink()
        typer.echo(f"removed {name}, {size(total)}")
