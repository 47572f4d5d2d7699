"""The gateway as a program: from its options to its clean end."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from pathlib import Path

from farthing.fleet.gateway.replicas import GatewayConfig
from farthing.fleet.gateway.server import Gateway

log = logging.getLogger(__name__)


async def serve(
    config: GatewayConfig,
    *,
    replicas: dict[str, str],
    replicas_file: Path | None = None,
    address: tuple[str, int] = ("127.0.0.1", 8000),
    fd: int | None = None,
    api_key_file: Path | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain.

    Raises ValueError on bad keys or URLs, OSError on a taken port.
    """
    keys = None
    if api_key_file is not None:
        from farthing.server.auth import KeyRing

        keys = KeyRing.from_file(api_key_file)
    gateway = Gateway(config, keys=keys, replicas_file=replicas_file)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sock = socket.socket(fileno=fd) if fd is not None else None
    port = await gateway.start(*address, sock=sock)
    if replicas:
        gateway.set_replicas(replicas)
    gc.collect()
    gc.freeze()  # what was imported lives for ever: a full collection need not look at it between two tokens
    log.info("gateway on port %d", port)
    await stop.wait()
    broken = await gateway.stop()
    log.info("gateway ended; %d requests were broken off", broken)
