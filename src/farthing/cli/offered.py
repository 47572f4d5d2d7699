"""Which model to talk to where none is named: those on this machine, and of the catalogue those that suit it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from farthing import hub, packages
from farthing.catalogue import catalogue
from farthing.cli.plan import measure
from farthing.cli.tables import size
from farthing.engine.tokenizer import has_chat_template
from farthing.hub import BUNDLED, EMBEDDED
from farthing.memory import machine_memory
from farthing.planner.estimate import Machine
from farthing.planner.offers import Offer, offers

_SHOWN = 6  # models of the catalogue that are offered
_CONNECT_SECONDS = 3.0


def named(model: str | None) -> str:
    """The model, or where none is named the user's choice; without a terminal the embedded one."""
    if model is not None:
        return model
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return EMBEDDED
    return _chosen(Console(stderr=True))


def all_offers() -> list[Offer]:
    """The whole catalogue on this machine, whose memory and processor are measured. Raises ValueError."""
    cpus, bandwidth, core = measure()
    return list(offers(Machine(1, cpus, bandwidth, core), machine_memory()))


def table(found: Sequence[Offer], numbered: int = 0) -> Table:
    """Models with what to expect of them. numbered: the first number; 0: none."""
    shown = Table(box=None, pad_edge=False)
    for name in ("", "model", "download", "memory", "tokens/s", "first token", ""):
        shown.add_column(name, justify="left" if name in ("", "model") else "right")
    for i, offer in enumerate(found):
        said = "gated" if offer.entry.gated else ""
        said = said if offer.fits else "needs more memory"
        shown.add_row(
            f"{numbered + i}" if numbered else "", f"{offer.entry.name} ({offer.file.type})",
            size(offer.file.size), size(offer.memory), f"{offer.tokens_per_second:.0f}",
            f"{offer.first_answer:.1f} s", said if offer.fits or not numbered else "",
        )  # fmt: skip
    return shown


def _chosen(console: Console) -> str:
    local = list(_local())
    if not local and not _reachable():
        console.print(
            f"the hub cannot be reached, and no model is on this machine: {_fallback()} is served. A model "
            "file can be named: farthing run FILE.gguf",
            highlight=False,
        )
        return _fallback()
    found = [offer for offer in all_offers() if offer.worth] if _reachable() else []
    found = [*found[: _SHOWN - 1], *found[-1:]] if len(found) > _SHOWN else found
    names = [*local, *(offer.entry.name for offer in found)]
    if not names:
        return _fallback()
    for i, name in enumerate(local, 1):
        console.print(f"{i}  {name}  (on this machine)", highlight=False)
    if found:
        console.print(table(found, len(local) + 1))
        console.print("Estimates, from this machine's memory and processor.", style="dim")
    return _read(console, names)


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


def _fallback() -> str:
    """What is here without a network."""
    offer = next((e.name for e in catalogue().values() if e.package and packages.file_of(e.package)), None)
    return offer or EMBEDDED


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
    if model in BUNDLED:
        return f"{model} is a small model of Python code: it continues what you write, and does not answer"
    if not has_chat_template(path):
        return f"{model} has no chat template: a base model, which continues what you write"
    return None
