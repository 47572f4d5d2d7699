"""The gateway server: socket, own endpoints, replicas, and graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from farthing.exchange import Upstream
from farthing.server.config import KeyRing, ambiguity, is_loopback
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.digests import Digests
from farthing_fleet.gateway.errors import Refused, error_response
from farthing_fleet.gateway.guard import Bodies, Door, guard_of, make_factory
from farthing_fleet.gateway.hold import Holds, Waker
from farthing_fleet.gateway.metrics import GatewayMetrics
from farthing_fleet.gateway.models import PATH, Models
from farthing_fleet.gateway.proxy import Proxy, outgoing
from farthing_fleet.gateway.replicas import Balancer, Health
from farthing_fleet.gateway.replicas_file import ReplicasFile

log = logging.getLogger(__name__)

_VERSIONS = (aiohttp.HttpVersion10, aiohttp.HttpVersion11)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_BACKLOG = 2048  # connections waiting to be accepted
_ACCEPTED = 32  # per iteration of the event loop, so that the first of a burst need not wait for the last
_MODEL_URL = re.compile(r"(?:(.+)=(?=https?:))?(.*)")
_FIRST_REQUEST_S = 1.0  # for a connection accepted just as the gateway stops


@dataclass(frozen=True)
class Page:
    """A response of the dashboard. open: no key required."""

    body: bytes
    content_type: str
    headers: Mapping[str, str]
    open: bool = True


class Gateway:
    """Serves one address for the replicas set by `set_replicas` or by a watched file."""

    def __init__(
        self,
        config: GatewayConfig | None = None,
        *,
        keys: KeyRing | None = None,
        replicas_file: Path | None = None,
        pages: Callable[[str, str], Page | None] | None = None,
        wake: Sequence[str] = (),
        replica_key: str | None = None,
    ) -> None:
        """pages(path, query): pages served next to the API, which may require a key.

        wake: URLs of controllers for reports of held requests, each MODEL=URL if there are several models;
        the names count as models even while they have no replica. replica_key: a metrics or admin key of the
        replicas, for reading their cache digests. Raises ValueError for an invalid URL.
        """
        self.config = config or GatewayConfig()
        self.balancer = Balancer(self.config)
        self.metrics = GatewayMetrics(self.balancer)
        self.holds = Holds(
            self.config.max_waiting,
            self.metrics,
            lambda pool: bool(self.balancer.candidates(model=pool or None)),
        )
        self.door = Door(self.config)
        self.bodies = Bodies(self.config)
        self.upstream = Upstream(self.config.connect_timeout_s, self.config.idle_timeout_s)
        self.models = Models(self.balancer, self.upstream, self.config.health_timeout_s)
        self.health = Health(
            self.config, lambda pool: self.proxy.silence(pool), self.models.meet, self.holds.notify
        )
        self._pages, self._keys = pages, keys
        self._file = ReplicasFile(replicas_file, self.set_replicas) if replicas_file is not None else None
        named = [_MODEL_URL.fullmatch(text).groups() for text in wake]  # type: ignore[union-attr]
        self._wakers = [Waker(url, self.holds, name or None) for name, url in named]
        self._awaited = [name for name, _ in named if name]  # models that a controller starts
        self.balancer.update({}, self._awaited)
        self._digests = Digests(self.config, self.balancer, self.upstream, replica_key)
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: asyncio.Server | None = None
        self._local_only = False

    # ---- lifecycle ----

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, *, sock: socket.socket | None = None
    ) -> int:
        """Listen on host:port, or on an already bound socket (which survives this process).

        Returns the port.
        """
        self.proxy = Proxy(
            self.config, self.balancer, self.metrics, self.holds, self.upstream, self.health.alive
        )
        if self._file is not None:
            self._file.read()
            self._tasks.append(asyncio.create_task(self._file.follow()))
        self._tasks.append(asyncio.create_task(self._digests.run()))
        self._tasks += [asyncio.create_task(waker.run()) for waker in self._wakers]
        where: dict[str, Any] = {"sock": sock} if sock is not None else {"host": host, "port": port}
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            make_factory(self.door, self._handle), backlog=_ACCEPTED, **where
        )
        for listening in self._listener.sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(_BACKLOG)
        # Prevents DNS rebinding: a web page could otherwise reach its visitor's keyless gateway.
        self._local_only = self._keys is None and is_loopback(self.address[0])
        return self.address[1]

    async def stop(self, drain_s: float | None = None) -> int:
        """Stop accepting, let in-flight requests finish, and cut off those left after `drain_s`.

        Returns the number of requests cut off.
        """
        self.holds.stop()
        if self._listener is not None:
            self._listener.close()
        now = asyncio.get_running_loop().time
        began = now()
        deadline = began + (self.config.drain_s if drain_s is None else drain_s)
        while self._close_idle(now() < began + _FIRST_REQUEST_S) and now() < deadline:
            await asyncio.sleep(0.02)
        left = [active for replica in self.balancer.everyone for active in replica.active]
        for active in left:
            active.interrupt("stopping")
        await self._clients_gone()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.health.close()
        self.upstream.close()
        return len(left)

    def _close_idle(self, patient: bool) -> bool:
        """Close connections without a request. Returns whether some are left to wait for.

        If `patient`, a connection just accepted is given a moment for its first request.
        """
        left = False
        for guard in list(self.door.guards):
            if guard.phase == "head" and not (patient and guard.fresh):
                guard.close()
            elif guard.phase != "closing":
                left = True
        return left

    async def _clients_gone(self) -> None:
        """Wait a moment for the last writes, then close the remaining connections."""
        for _ in range(25):
            if not any(guard.phase == "request" for guard in self.door.guards):
                break
            await asyncio.sleep(0.02)
        for guard in list(self.door.guards):
            guard.close()
        await asyncio.sleep(0)

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) of the listening socket."""
        assert self._listener is not None
        host, port = self._listener.sockets[0].getsockname()[:2]
        return str(host), int(port)

    @property
    def stopping(self) -> bool:
        """Whether the gateway is shutting down."""
        return self.holds.stopping

    # ---- replicas ----

    def set_replicas(self, wanted: dict[str, str], models: Sequence[str] = ()) -> None:
        """Set the replicas {name: url}, and models that are accepted even while they have none.

        Raises ValueError for a URL that is not http://HOST:PORT.
        """
        for replica in self.balancer.update(wanted, [*models, *self._awaited]):
            log.info("replica %s at %s", replica.name, replica.url)
            self.health.watch(replica)
        self.holds.notify()

    def state(self) -> dict[str, Any]:
        """The state of the replicas, as JSON-serializable values."""
        return {
            "waiting": self.holds.waiting,
            "replicas": [
                {
                    "name": r.name,
                    "url": r.url,
                    "model": r.pool,
                    "healthy": r.healthy,
                    "available": r.available,
                    "inflight": r.inflight,
                    "served": r.served,
                    "failed": r.failed,
                }
                for r in self.balancer.replicas.values()
            ],
        }

    # ---- requests ----

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        guard = guard_of(request)
        close = True
        try:
            try:
                response = await self._answer(request, guard.peer if guard is not None else "unknown")
            except Refused as refused:
                response = error_response(refused, request.path)
            if self.stopping and not response.prepared:
                response.force_close()
            close = not (response.keep_alive if response.keep_alive is not None else request.keep_alive)
            return response
        finally:
            if guard is not None:
                guard.ended(close=close)

    async def _answer(self, request: web.BaseRequest, peer: str) -> web.StreamResponse:
        """Answer a request, from the gateway or a replica. Raises Refused."""
        self._check_head(request)
        own = self._public(request) or self._private(request)
        if own is not None:
            return own
        # A browser sends no key with a preflight; it does not wake a fleet, either.
        open_to_all = _is_preflight(request) and self.balancer.candidates()
        client = "" if open_to_all else self._check_key(request)
        async with self.bodies.read(request) as body:
            self.metrics.received.inc()
            sent = outgoing(request, body, peer, self.config)
            prompt = await self.models.find(sent.prompt, sent.target, sent.headers, body)
            sent = sent if prompt is sent.prompt else replace(sent, prompt=prompt)
            if request.path == PATH and request.method == "GET" and len(self.balancer.pools) > 1:
                return web.json_response(self.models.listed())
            return await self.proxy.answer(request, sent, client)

    def _check_head(self, request: web.BaseRequest) -> None:
        """Reject requests that must not reach a replica. Raises Refused, or ConnectionError once answered."""
        if request.version not in _VERSIONS:  # aiohttp would answer in the client's version
            guard = guard_of(request)
            if guard is not None:
                guard.refuse(505, "expected HTTP/1.1")
            raise ConnectionError("unsupported version of HTTP")
        if request.method not in _METHODS:
            raise Refused(
                405,
                f"method {request.method} is not supported; expected one of {', '.join(sorted(_METHODS))}",
                headers={"Allow": ", ".join(sorted(_METHODS))},
                close=True,
            )
        if not request.rel_url.raw_path.startswith("/"):  # OPTIONS * names no resource of a replica
            raise Refused(400, f"request target is {request.path!r}; expected a path", close=True)
        codings = ", ".join(request.headers.getall("Transfer-Encoding", ()))
        if (
            codings and codings.strip().lower() != "chunked"
        ):  # the body would pass on without its coding's name
            raise Refused(501, f"Transfer-Encoding is {codings[:100]!r}; expected chunked", close=True)
        target = request.raw_path.encode(errors="surrogateescape")
        if (problem := ambiguity(target, request.raw_headers, request.version)) is not None:
            raise Refused(400, problem, close=True)
        host = request.headers.get("Host", "")
        if host and self._local_only and not _names_this_machine(host):
            raise Refused(
                403, "gateway without keys; expected a loopback name in the Host header", close=True
            )
        size = sum(len(name) + len(value) + 4 for name, value in request.raw_headers)
        if size + len(request.raw_path) > self.config.max_head:
            raise Refused(431, f"request head exceeds {self.config.max_head} bytes", close=True)

    def _public(self, request: web.BaseRequest) -> web.Response | None:
        """An answer of the gateway itself that needs no key, or None."""
        path = request.path
        if path == "/live":
            return web.json_response({"status": "ok"})
        if path == "/health":
            ready = len(self.balancer.candidates())
            status = "ok" if ready else "no replica is ready"
            return web.json_response({"status": status, "ready": ready}, status=200 if ready else 503)
        if path == "/metrics":
            return web.Response(body=self.metrics.render(), content_type="text/plain")
        if self._pages is None or request.method not in ("GET", "HEAD"):
            return None
        page = self._pages(path, request.query_string)
        if page is None:
            return None
        if not page.open:
            self._check_key(request)
        return web.Response(body=page.body, headers={**page.headers, "Content-Type": page.content_type})

    def _private(self, request: web.BaseRequest) -> web.Response | None:
        """An answer of the gateway itself that needs a key, or None. Raises Refused."""
        if request.path != "/fleet/replicas":
            return None
        self._check_key(request)
        return web.json_response(self.state())

    def _check_key(self, request: web.BaseRequest) -> str:
        """The name of a request's API key; empty without keys. Raises Refused."""
        if self._keys is None:
            return ""
        key = request.headers.get("X-Api-Key")  # Anthropic's header
        header = request.headers.get("Authorization") or (f"Bearer {key}" if key else None)
        name = self._keys.check(header)
        if name is None:
            raise Refused(
                401,
                "missing or invalid API key; expected Authorization: Bearer KEY, or X-Api-Key: KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
                close=request.body_exists,
            )
        return name


def _is_preflight(request: web.BaseRequest) -> bool:
    """Whether a browser asks if a page may send a request, which a replica's --allowed-origins decides."""
    asks = "Origin" in request.headers and "Access-Control-Request-Method" in request.headers
    return request.method == "OPTIONS" and asks and not request.body_exists


def _names_this_machine(host: str) -> bool:
    """Whether a Host header (with or without a port) is a loopback name or address."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    return is_loopback(name.rstrip(".").lower()) or name.endswith(".localhost")
