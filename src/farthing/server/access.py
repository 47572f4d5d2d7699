"""Access control from request headers: host names, API keys, and permission to read metrics."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from fnmatch import fnmatchcase

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from farthing.server.config import ANONYMOUS, KeyRing, ServerConfig, is_loopback
from farthing.server.errors import ApiError, send_error

LOCAL = "localhost"  # stands for every name and address of this machine
_NUMBERS = ("/metrics", "/cache/digest")  # for scrapers and gateways
_BY_CURL = b"application/x-www-form-urlencoded"
_FROM_PAGES = {b"origin", b"referer", b"sec-fetch-site", b"sec-fetch-mode"}
_PROXIED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


@dataclass(frozen=True, slots=True)
class Viewer:
    """The metrics a request may see: all of them, or those of the key called `name`."""

    everything: bool
    name: str


class Access:
    """ASGI middleware: sets scope["client_name"] and scope["viewer"], or answers 401 or 403.

    open_paths need no key. /metrics is one of them unless a metrics key is set; its per-key metrics are
    only shown to viewers that may see all metrics.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, open_paths: frozenset[str]) -> None:
        self.app = app
        self._keys, self._admins = config.keys or KeyRing(()), config.admin_keys or KeyRing(())
        self._scrapers = config.metrics_keys or KeyRing(())
        self._needs_key = bool(self._keys)
        self._has_keys = bool(self._keys or self._admins or self._scrapers)
        self._open = open_paths
        self._max_head_bytes = config.max_header_bytes
        self._hosts = allowed_hosts(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request or reject it."""
        if scope["type"] == "http":
            try:
                self._admit(scope)
            except ApiError as error:
                await send_error(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"]) + len(scope["raw_path"])
        if size > self._max_head_bytes:  # oversized headers that arrived in one read
            message = f"the head is too large; expected at most {self._max_head_bytes} bytes"
            raise ApiError(431, message, code="head_too_large")
        headers = dict(scope["headers"])
        self._check_host(headers.get(b"host", b""))
        header = _credentials(headers) if self._has_keys else ""
        admin = self._admins.check(header) if header else None
        client = self._keys.check(header) if header else None
        path = scope["path"]
        scope["client_name"] = client or admin or ANONYMOUS
        everything = admin is not None or not self._needs_key
        if path in _NUMBERS:
            near, scraper = is_near(scope, headers), self._scrapers.check(header) is not None
            if self._scrapers and not (scraper or near or admin):
                raise _unknown_key(header)
            everything = scraper or near or everything
        elif self._needs_key and path not in self._open and client is None and admin is None:
            raise _unknown_key(header)
        scope["viewer"] = Viewer(everything, client or ANONYMOUS)
        if path.startswith("/api/"):
            _declare_json(scope, headers)

    def _check_host(self, host: bytes) -> None:
        """Check the Host header: DNS rebinding would let a web page reach a visitor's keyless server."""
        if self._hosts is None or not host:
            return
        name = _host_name(host.decode("latin-1"))
        if not any(fnmatchcase(name, pattern) for pattern in self._hosts) and not (
            LOCAL in self._hosts and (is_loopback(name) or name.endswith(".localhost"))
        ):
            raise ApiError(
                403, f"the Host {name!r} is not served here; see --allowed-hosts", code="host_not_allowed"
            )


def _declare_json(scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Ollama takes every body as JSON, so its clients, and `curl -d` in its documentation, need not say so.
    Web pages, whose requests name their origin, must: browsers ask the server first if they may."""
    if headers.get(b"content-type", _BY_CURL) == _BY_CURL and not _FROM_PAGES & headers.keys():
        others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope["headers"] = [*others, (b"content-type", b"application/json")]


def _credentials(headers: dict[bytes, bytes]) -> str:
    """The Authorization header, or Anthropic's X-Api-Key in the same form."""
    given = headers.get(b"authorization", b"").decode("latin-1")
    key = headers.get(b"x-api-key", b"").decode("latin-1")
    return given or (f"Bearer {key}" if key else "")


def allowed_hosts(config: ServerConfig) -> tuple[str, ...] | None:
    """Patterns of host names; None: any.

    By default a keyless server on a loopback address accepts only names of this machine.
    """
    if "*" in config.allowed_hosts:
        return None
    if config.allowed_hosts:
        return tuple(name.lower() for name in config.allowed_hosts)
    if config.keys or not is_loopback(config.host):
        return None
    return (LOCAL, config.host.strip("[]").lower())


def _host_name(host: str) -> str:
    """`[::1]:8000`, `localhost:8000` and `localhost` without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower().rstrip(".")


def is_near(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether the request comes directly from this machine, not through a local proxy."""
    client = scope.get("client")
    if not client or any(name in headers for name in _PROXIED):
        return False
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def require_own_page(config: ServerConfig, request: Request, refusal: str, instead: str) -> None:
    """Raises ApiError (403) unless the request comes from a page, or a program, of this machine, to a server
    that only this machine can reach, without a proxy between them and, where there are keys, with an admin
    key. refusal, instead: the error's beginning and end."""
    origin, site = (request.headers.get(name) for name in ("origin", "sec-fetch-site"))
    own = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if not is_loopback(config.host):
        why = "this server's address is reachable from other machines"
    elif not is_near(request.scope, dict(request.scope["headers"])):
        why = "the request comes from another machine, or through a proxy"
    elif not own or site not in (None, "same-origin", "none"):
        why = "the request comes from another server's page"
    elif not request.scope["viewer"].everything:
        why = "it takes an admin key"
    else:
        return
    raise ApiError(403, f"{refusal}: {why}; use {instead}", code="forbidden")


def _unknown_key(header: str) -> ApiError:
    problem = "the API key is unknown" if header else "no API key"
    return ApiError(
        401, f"{problem}; expected `Authorization: Bearer KEY` or `X-Api-Key: KEY`", code="invalid_api_key"
    )
