"""`farthing ps` and `farthing stop`: the servers of this user on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

import typer

from farthing.cli.errors import one_line_errors
from farthing.cli.tables import size
from farthing.memory import available_memory, resident, written
from farthing.running import Running, running

ps_app = typer.Typer(add_completion=False)
stop_app = typer.Typer(add_completion=False)
_CACHE, _READY = "farthing:kv_cache_bytes", "farthing:written_at_ready_bytes"
_SECONDS = 2.0  # for the metrics of a server
_END_SECONDS = 60.0  # for a server to finish its answers


@ps_app.command()
def ps(as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False) -> None:
    """Show the servers that run on this machine, and what they take of its memory.

    Weights include the program; the cache grows to its size while it fills.
    """
    found = [(server, _memory(server)) for server in running()]
    if as_json:
        typer.echo(json.dumps([asdict(server) | memory for server, memory in found]))
        return
    if not found:
        typer.echo("no server runs here; start one: farthing serve")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("pid", "model", "address", "weights", "cache"):
        table.add_column(name, no_wrap=name != "model")
    for server, memory in found:
        cache = f"{size(memory['cache_used'])} of {size(memory['cache'])}" if "cache" in memory else "-"
        weights = size(memory.get("weights", memory["memory"]))
        table.add_row(str(server.pid), server.model, server.url, weights, cache)
    console = Console()
    console.print(table)
    console.print(f"free: {size(available_memory())}", highlight=False)


def _memory(server: Running) -> dict[str, int]:
    """Bytes: of the process, and where its server says so of weights and cache."""
    memory = {"memory": resident(server.pid)}
    with (
        suppress(OSError, ValueError),
        urllib.request.urlopen(f"{server.url}/metrics", timeout=_SECONDS) as a,
    ):
        values = _gauges(a.read().decode())
        if _CACHE in values and _READY in values:
            filled = max(0, written(server.pid) - int(values[_READY]))
            memory |= {
                "weights": memory["memory"] - filled,
                "cache": int(values[_CACHE]),
                "cache_used": filled,
            }
    return memory


def _gauges(text: str) -> dict[str, float]:
    """The last value of every gauge, by its name without labels."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#") and line.strip():
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] = float(value)
    return found


@stop_app.command(epilog="Examples:  farthing stop  |  farthing stop qwen3-8b  |  farthing stop 8001")
def stop(
    which: Annotated[
        str | None,
        typer.Argument(metavar="[SERVER]", help="Its model, process or port; default: the only one."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Stop every server.")] = False,
) -> None:
    """Stop a server of `farthing ps`, once its answers have ended."""
    with one_line_errors("stop"):
        for server in _chosen(running(), which, every):
            os.kill(server.pid, signal.SIGTERM)
            _wait(server)
            typer.echo(f"stopped {server.model}, {server.url}")


def _chosen(found: Sequence[Running], which: str | None, every: bool) -> Sequence[Running]:
    """Raises ValueError unless they are named."""
    if not found:
        raise ValueError("no server runs here, as far as `farthing ps` knows")
    if every or (which is None and len(found) == 1):
        return found
    matching = [s for s in found if which in (str(s.pid), s.model, s.url, s.url.rpartition(":")[2])]
    if len(matching) != 1:
        listed = ", ".join(f"{s.pid} ({s.model}, {s.url})" for s in found)
        said = "nothing" if which is None else repr(which)
        raise ValueError(f"server: got {said}; expected one of {listed}, or --all")
    return matching


def _wait(server: Running) -> None:
    deadline = time.monotonic() + _END_SECONDS
    while any(each.pid == server.pid for each in running()):
        if time.monotonic() > deadline:
            raise ValueError(f"{server.model} still answers requests; it ends after them")
        time.sleep(0.05)
