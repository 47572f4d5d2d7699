"""Models on this machine: `pull` downloads one, `list`, `show` and `rm` manage what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from farthing import hub, stores
from farthing.catalogue import hub_id
from farthing.checkpoint.reader import has_config, read_config
from farthing.cli.errors import Exit, errors_as_one_line, log_lines, one_line_errors
from farthing.cli.tables import size, step_progress
from farthing.config import EngineConfig
from farthing.memory import available_memory
from farthing.planner.fit import fit

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

    console = Console()
    if not console.is_terminal:  # whole names, in columns that `cut` and `awk` split
        for each in models:
            typer.echo("\t".join((each.model, size(each.size), each.type, each.state)))
        return
    table = Table("model", "size", "type", "", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for each in models:
        table.add_row(each.model, size(each.size), each.type, each.state)
    console.print(table)


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


def _bytes_in(path: Path) -> int:
    """On the disk: a header's file is as long as the whole, and has its first bytes."""
    files = [path, *path.rglob("*")]
    return sum(512 * file.stat().st_blocks for file in files if file.is_file())


rm_app = typer.Typer(add_completion=False)


@rm_app.command()
def rm(
    model: _Model,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove MODEL from the hub's cache, with everything that was made of it."""
    with one_line_errors("rm"), errors_as_one_line():
        if program := stores.program_of(model):
            raise ValueError(f"model: got {model!r}, which belongs to {program}; remove it there")
        name = hub.without_file(hub_id(model))
        found = next((each for each in hub.cached() if each.model == name), None)
        if found is None:
            raise FileNotFoundError(
                f"model: got {model!r}; expected a model of the hub's cache, as `farthing list` shows it"
            )
        total = found.size + sum(map(_bytes_in, hub.made_of(found)))
        if not (yes or typer.confirm(f"remove {name}, {size(total)}?")):
            raise typer.Exit(Exit.INPUT)
        hub.remove_cached(found)
        typer.echo(f"removed {name}, {size(total)}")
