"""Replicas by DNS: the addresses behind a headless Service, kept in the file a gateway watches."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

from farthing.fleet.gateway.replicas_file import write_replicas

log = logging.getLogger(__name__)

EVERY_S = 2.0
# DNS errors of a headless Service without a ready pod: "no such name" and "no address". Other errors (such as
# a resolver that is down) say nothing about the replicas.
_EMPTY = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


async def addresses(host: str, port: int) -> dict[str, str] | None:
    """{address: URL} for every address of `host`; None if the resolver does not answer."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as problem:
        return {} if problem.errno in _EMPTY else None
    names = sorted({str(entry[4][0]) for entry in found})
    return {name: f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}" for name in names}


async def follow(address: tuple[str, int], path: Path, every_s: float = EVERY_S) -> None:
    """Resolve (host, port) every `every_s` seconds and write the replicas to `path` when they change."""
    known: dict[str, str] | None = None
    while True:
        found = await addresses(*address)
        if found is None:
            log.warning("%s: the resolver does not answer; keeping the last replicas", address[0])
        elif found != known:
            write_replicas(path, found)
            log.info("%s: %d replicas", address[0], len(found))
            known = found
        await asyncio.sleep(every_s)
