"""The gateway as a process: keys, dashboard, signals, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.gateway.errors import Refused
from farthing.fleet.gateway.server import Gateway, Page
from farthing.server.auth import KeyRing, warn_if_public

if TYPE_CHECKING:
    from farthing.server.dashboard.site import Dashboard

log = logging.getLogger(__name__)

_SAMPLE_S, _SAMPLES = 2.0, 1800  # one hour of dashboard samples


async def serve(
    config: GatewayConfig,
    *,
    replicas: dict[str, str],
    replicas_file: Path | None = None,
    address: tuple[str, int] = ("127.0.0.1", 8000),
    fd: int | None = None,
    api_key_file: Path | None = None,
    state: Path | None = None,
    usd_per_hour: float | None = None,
    wake: str | None = None,
    replica_key_file: Path | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain.

    state: the controller's directory, whose decisions the dashboard shows; usd_per_hour: price per replica;
    wake: the controller's URL for reports of held requests; replica_key_file: file with a key that may read
    the replicas' metrics and cache digests. Raises ValueError for invalid keys or URLs, OSError if the port
    is in use.
    """
    raise_file_limit()
    keys = None
    if api_key_file is not None:
        keys = KeyRing.from_file(api_key_file)
    replica_key = None
    if replica_key_file is not None:
        replica_key = replica_key_file.read_text().strip()
        warn_if_public(replica_key_file)
    from farthing.fleet.overview import fleet_data
    from farthing.server.dashboard.site import Dashboard

    dashboard = Dashboard(lambda: fleet_data(gateway, state, usd_per_hour), _SAMPLE_S, _SAMPLES)
    gateway = Gateway(
        config,
        keys=keys,
        replicas_file=replicas_file,
        pages=pages_of(dashboard),
        wake=wake,
        replica_key=replica_key,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sock = socket.socket(fileno=fd) if fd is not None else None
    port = await gateway.start(*address, sock=sock)
    if replicas:
        gateway.set_replicas(replicas)
    gc.collect()
    gc.freeze()  # imports are permanent: full collections can skip them
    log.info("gateway on port %d, dashboard at /", port)
    sampling = asyncio.create_task(_sample(dashboard))
    await stop.wait()
    sampling.cancel()
    broken = await gateway.stop()
    log.info("gateway stopped; %d requests were cut off", broken)


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard limit: each request needs two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("open files: limit %d, was %d", hard, soft)


async def _sample(dashboard: Dashboard) -> None:
    """Sample the dashboard, in the event loop to avoid races."""
    while True:
        try:
            dashboard.sample()
        except Exception:  # a dashboard failure must not stop the gateway
            log.exception("the dashboard's source failed")
        await asyncio.sleep(_SAMPLE_S)


def pages_of(dashboard: Dashboard) -> Callable[[str, str], Page | None]:
    """The dashboard's page and assets (public) and its data (requires a key)."""
    from farthing.server.dashboard.site import DATA_PATH, HEADERS, PREFIX

    def pages(path: str, query: str) -> Page | None:
        if path == DATA_PATH:
            body = json.dumps(dashboard.document(_since(query))).encode()
            return Page(body, "application/json", HEADERS, open=False)
        asset = dashboard.asset(path)
        if asset is None and path.startswith(PREFIX):  # a replica's page would not fit the gateway's
            raise Refused(404, f"{path}: no such page", code="unknown_url")
        return Page(asset.body, asset.content_type, HEADERS) if asset is not None else None

    return pages


def _since(query: str) -> float:
    """`since=T` of a query; 0 if missing or not a number."""
    try:
        return float(parse_qs(query)["since"][0])
    except (KeyError, ValueError):
        return 0.0
