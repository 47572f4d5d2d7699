"""Where a gateway finds its replicas: a file, watched for changes, or names in DNS.

    {"replicas": [{"name": NAME, "url": URL}], "models": [MODEL]}

`models` (optional) names models that the gateway accepts even while they have no replica.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from farthing.files import replace_text

log = logging.getLogger(__name__)

_POLL_S = 0.05
_ROOM = 8192  # minimum size of the file, so that a later version fits in place


class ReplicasFile:
    """Watches a file. A missing or invalid version leaves the set of replicas unchanged."""

    def __init__(self, path: Path, on_change: Callable[[dict[str, str], tuple[str, ...]], None]) -> None:
        self._path, self._on_change = path, on_change
        self._stamp: tuple[int, int] | None = None
        self._problem = ""  # why the current version is ignored

    async def follow(self) -> None:
        """Read the file whenever it changes, forever."""
        while True:
            await asyncio.sleep(_POLL_S)
            self.read()

    def read(self) -> None:
        """Report the file's replicas if it has changed."""
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino)
            if stamp == self._stamp:
                return
            self._on_change(*read_replicas(self._path))
            self._stamp = stamp
        except FileNotFoundError:
            return
        except (OSError, ValueError) as problem:
            if str(problem) != self._problem:
                log.warning("replicas file %s ignored: %s", self._path, problem)
            self._problem = str(problem)
        else:
            self._problem = ""


def read_replicas(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """{name: url} of a replicas file, and its models. Raises ValueError with the problem."""
    try:
        data = json.loads(path.read_text())
        models = data.get("models", [])
        if not (isinstance(models, list) and all(name and isinstance(name, str) for name in models)):
            raise ValueError(f"{path}: models: got {models!r}; expected a list of names")
        return {str(item["name"]): str(item["url"]) for item in data["replicas"]}, tuple(models)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as problem:
        raise ValueError(
            f'{path}: expected {{"replicas": [{{"name": …, "url": …}}]}} ({problem!r})'
        ) from problem


def write_replicas(path: Path, replicas: dict[str, str], models: Sequence[str] = ()) -> None:
    """Replace a replicas file atomically.

    If the disk is full it is overwritten in place, in its existing space; a reader that sees a partial file
    reads again. Raises OSError if that fails too.
    """
    listed = [{"name": name, "url": url} for name, url in replicas.items()]
    text = json.dumps({"replicas": listed, "models": list(models)}).ljust(_ROOM)
    try:
        replace_text(path, text, durable=False)
    except OSError:
        with path.open("r+b", buffering=0) as file:
            file.write(text.encode())
            file.truncate()


# Replicas by DNS: the addresses behind a headless Service.

EVERY_S = 2.0
# DNS errors of a headless Service without a ready pod: "no such name" and "no address". Other errors (such as
# a resolver that is down) say nothing about the replicas.
_EMPTY = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


async def addresses(host: str, port: int) -> dict[str, str] | None:
    """{address: URL} for every address of `host`; None if the resolver does not answer."""
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as problem:
        return {} if problem.errno in _EMPTY else None
    names = sorted({str(entry[4][0]) for entry in infos})
    return {name: f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}" for name in names}


async def follow(
    places: Sequence[tuple[str, int]], on_change: Callable[[dict[str, str]], None], every_s: float = EVERY_S
) -> None:
    """Resolve each (host, port) every `every_s` seconds, forever; report the replicas when they change."""
    current: dict[tuple[str, int], dict[str, str]] = {}
    while True:
        before = dict(current)
        for place in places:
            latest = await addresses(*place)
            if latest is None:
                log.warning("%s: the resolver does not answer; keeping the last replicas", place[0])
            elif latest != current.get(place):
                current[place] = latest
                log.info("%s: %d replicas", place[0], len(latest))
        if current != before:
            on_change({name: url for found in current.values() for name, url in found.items()})
        await asyncio.sleep(every_s)
