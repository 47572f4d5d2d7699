"""The gateway's process: a listening socket, health checks, the file that names the replicas, metrics,
and a clean end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from farthing.fleet.gateway import messages
from farthing.fleet.gateway.messages import Request, ResponseHead
from farthing.fleet.gateway.metrics import GatewayMetrics
from farthing.fleet.gateway.relay import ClientConnection
from farthing.fleet.gateway.replicas import Balancer, GatewayConfig, Replica
from farthing.fleet.gateway.upstream import ReplicaLost

log = logging.getLogger(__name__)

_FILE_POLL_S = 0.05
_FIRST_REQUEST_S = 1.0  # for a connection that is accepted just as the gateway stops
_FIRST_CHECK_S = 0.1  # between health checks of a replica that was never healthy


class Keys(Protocol):
    """What the gateway needs of an API-key file: the key's name for an Authorization header, None for a
    wrong one.
    """

    def check(self, header_value: str | None) -> str | None: ...


@dataclass(frozen=True)
class Page:
    """An answer of the dashboard. open: shown without a key."""

    body: bytes
    content_type: str
    headers: Mapping[str, str]
    open: bool = True

    def render(self) -> bytes:
        """The whole answer."""
        extra = self.headers.items()
        return messages.response(200, self.body, content_type=self.content_type, extra=extra)


class Gateway:
    """Serves one address for the replicas given by `set_replicas` or by a file that is watched."""

    def __init__(
        self,
        config: GatewayConfig | None = None,
        *,
        keys: Keys | None = None,
        replicas_file: Path | None = None,
        pages: Callable[[str, str], Page | None] | None = None,
    ) -> None:
        """pages(path, query): what is shown beside the API; a page may be guarded by the keys."""
        self.config = config or GatewayConfig()
        self._pages = pages
        self.balancer = Balancer(self.config)
        self.metrics = GatewayMetrics(self.balancer)
        self.clients: set[ClientConnection] = set()
        self.stopping = False
        self.now = time.monotonic
        self._keys = keys
        self._file = replicas_file
        self._file_stamp: tuple[int, int] | None = None
        self._server: asyncio.Server | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._waiting = 0

    # ---- life ------------------------------------------------------------------------------------
    async def start(
        self, host: str = "127.0.0.1", port: int = 0, *, sock: socket.socket | None = None
    ) -> int:
        """Listen on host:port, or on a socket already bound (which survives this process).

        Returns the port.
        """
        loop = asyncio.get_running_loop()
        where: dict[str, Any] = {"sock": sock} if sock is not None else {"host": host, "port": port}
        if self._file is not None:
            self._read_file()
        self._server = await loop.create_server(lambda: ClientConnection(self), backlog=2048, **where)
        self._tasks["sweep"] = asyncio.create_task(self._sweep())
        if self._file is not None:
            self._tasks["file"] = asyncio.create_task(self._watch_file())
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self, drain_s: float | None = None) -> int:
        """Accept no more, let requests under way end, and break off what is left.

        Returns how many were broken off.
        """
        self.stopping = True
        self._notify()  # who waits for a replica is told so now
        if self._server is not None:
            self._server.close()
        began = self.now()
        deadline = began + (self.config.drain_s if drain_s is None else drain_s)
        while self._close_idle(self.now() < began + _FIRST_REQUEST_S) and self.now() < deadline:
            await asyncio.sleep(0.02)
        left = [client for client in self.clients if client.busy]
        for client in left:
            client.give_up("the gateway stops")
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for client in list(self.clients):
            client.close()
        await asyncio.sleep(0)
        return len(left)

    def _close_idle(self, patient: bool) -> bool:
        """Close connections without a request; whether some are left to wait for.

        A connection just accepted is `patient`ly given a moment for its first request: it could not know.
        """
        for client in list(self.clients):
            if not client.busy and not (patient and client.expecting):
                client.close()
        return any(client.busy or (patient and client.expecting) for client in self.clients)

    # ---- replicas --------------------------------------------------------------------------------
    def set_replicas(self, wanted: dict[str, str]) -> None:
        """Take over the set {name: url}. Raises ValueError on a URL that is not http://HOST:PORT."""
        for replica in self.balancer.update(wanted):
            log.info("replica %s at %s", replica.name, replica.url)
            self._tasks[f"health {replica.url}"] = asyncio.create_task(self._watch_health(replica))
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, timeout: float) -> None:
        """Return when the set of replicas or a replica's health changes, or after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout)

    async def _watch_health(self, replica: Replica) -> None:
        seen_healthy = False
        while not replica.draining:
            before = replica.healthy
            replica.checked(await self._check(replica), self.config.unhealthy_after)
            seen_healthy |= replica.healthy
            if replica.healthy != before:
                log.info("replica %s is %s", replica.name, "healthy" if replica.healthy else "unhealthy")
                self._notify()
            await asyncio.sleep(self.config.health_interval_s if seen_healthy else _FIRST_CHECK_S)
        if self._tasks.get(f"health {replica.url}") is asyncio.current_task():
            del self._tasks[f"health {replica.url}"]

    async def _check(self, replica: Replica) -> bool:
        """One health check over a connection of its own."""
        probe = _Probe()
        request = Request(b"GET", self.config.health_path.encode(), "1.1", [(b"connection", b"close")])
        try:
            async with asyncio.timeout(self.config.health_timeout_s):
                connection = await replica.pool.connect()
                try:
                    connection.send(request.render(replica.host, b"gateway"), probe)
                    return await probe.status == 200
                finally:
                    connection.abort()
        except (ReplicaLost, TimeoutError):
            return False

    async def _watch_file(self) -> None:
        while True:
            await asyncio.sleep(_FILE_POLL_S)
            self._read_file()

    def _read_file(self) -> None:
        """Take over the replicas file if it changed.

        A file that is missing or broken leaves the set as it is.
        """
        assert self._file is not None
        try:
            stat = self._file.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino)
            if stamp == self._file_stamp:
                return
            self._file_stamp = stamp
            self.set_replicas(read_replicas(self._file))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as problem:
            log.warning("replicas file %s ignored: %s", self._file, problem)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.config.idle_timeout_s / 4))
            now = self.now()
            for client in list(self.clients):
                client.check_idle(now)

    # ---- requests --------------------------------------------------------------------------------
    def answer(self, request: Request) -> bytes | None:
        """The answer to what the gateway answers itself; None for what a replica is to answer."""
        path = request.path
        if path == "/live":
            return messages.response(200, b'{"status":"ok"}')
        if path == "/health":
            ready = len(self.balancer.candidates())
            body = json.dumps({"status": "ok" if ready else "no replica is ready", "ready": ready}).encode()
            return messages.response(200 if ready else 503, body)
        if path == "/metrics":
            return messages.response(200, self.metrics.render(), content_type="text/plain; version=0.0.4")
        page = self._page(request)
        if page is not None and page.open:
            return page.render()
        if self._keys is not None:
            header = request.header(b"authorization")
            if self._keys.check(header.decode("latin-1") if header else None) is None:
                challenge = [("www-authenticate", "Bearer")]
                return messages.error(
                    401, "a valid API key is needed: Authorization: Bearer KEY", extra=challenge
                )
        if page is not None:
            return page.render()
        if path == "/fleet/replicas":
            return messages.response(200, json.dumps(self.state()).encode())
        return None

    def _page(self, request: Request) -> Page | None:
        """A page of the dashboard, where there is one and this asks for it."""
        if self._pages is None or request.method != b"GET":
            return None
        return self._pages(request.path, request.query)

    def state(self) -> dict[str, Any]:
        """The replicas as the gateway sees them."""
        return {
            "waiting": self._waiting,
            "replicas": [
                {
                    "name": r.name,
                    "url": r.url,
                    "healthy": r.healthy,
                    "available": r.available,
                    "inflight": r.inflight,
                    "served": r.served,
                    "failed": r.failed,
                }
                for r in self.balancer.replicas.values()
            ],
        }

    @contextlib.contextmanager
    def waiting(self) -> Iterator[bool]:
        """Count a request while it waits for a replica; False when too many wait already."""
        if self._waiting >= self.config.max_waiting:
            yield False
            return
        self._waiting += 1
        self.metrics.waiting.inc()
        try:
            yield True
        finally:
            self._waiting -= 1
            self.metrics.waiting.dec()


class _Probe:
    """A Sink that keeps the status of an answer."""

    def __init__(self) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def head(self, head: ResponseHead) -> None:
        if not self.status.done():
            self.status.set_result(head.status)

    def body(self, data: bytes) -> None:
        """A health check's body says nothing."""

    def end(self) -> None:
        """The status was enough."""

    def lost(self, reason: str) -> None:
        if not self.status.done():
            self.status.set_result(0)


def read_replicas(path: Path) -> dict[str, str]:
    """{name: url} of a replicas file. Raises ValueError naming what is wrong."""
    try:
        data = json.loads(path.read_text())
        replicas = data["replicas"]
        return {str(item["name"]): str(item["url"]) for item in replicas}
    except (json.JSONDecodeError, KeyError, TypeError) as problem:
        raise ValueError(
            f'{path}: {{"replicas": [{{"name": …, "url": …}}]}} is needed ({problem!r})'
        ) from problem


def write_replicas(path: Path, replicas: dict[str, str]) -> None:
    """Replace a replicas file in one step, so that no reader sees half of it."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(
        json.dumps({"replicas": [{"name": name, "url": url} for name, url in replicas.items()]})
    )
    scratch.replace(path)
