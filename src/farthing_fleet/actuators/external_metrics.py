"""The external-metrics API for a Kubernetes HPA: external.metrics.k8s.io/v1beta1, as an aggregated API
server.

The kube-aggregator calls it over TLS with its client certificate and names the user in headers. Both are
trusted only with a certificate signed by the front-proxy authority under an allowed name. A
SubjectAccessReview then decides access. A missing metric is an error, on which an HPA keeps its number of
replicas.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import web

from farthing_fleet.actuators.base import METRICS, ActuatorError, LastDecision
from farthing_fleet.actuators.kubernetes import Access

log = logging.getLogger(__name__)

GROUP, VERSION = "external.metrics.k8s.io", "v1beta1"
ROOT = f"/apis/{GROUP}/{VERSION}"
_RELOAD_S = 10.0  # between checks of the certificate files, which Kubernetes rotates in place


@dataclass(frozen=True)
class FrontProxy:
    """Clients that may authenticate users: ConfigMap kube-system/extension-apiserver-authentication, mounted
    or read.
    """

    client_ca: str  # PEM
    allowed_names: tuple[str, ...] = ("front-proxy-client",)  # empty: any name signed by the authority
    username_headers: tuple[str, ...] = ("X-Remote-User",)
    group_headers: tuple[str, ...] = ("X-Remote-Group",)
    extra_prefixes: tuple[str, ...] = ("X-Remote-Extra-",)

    @classmethod
    def from_config_map(cls, data: Mapping[str, str]) -> FrontProxy:
        """From the ConfigMap's data. Raises ValueError with the missing or invalid key."""
        try:
            return cls(
                data["requestheader-client-ca-file"],
                tuple(json.loads(data["requestheader-allowed-names"])),
                tuple(json.loads(data["requestheader-username-headers"])),
                tuple(json.loads(data["requestheader-group-headers"])),
                tuple(json.loads(data["requestheader-extra-headers-prefix"])),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as problem:
            raise ValueError(
                f"extension-apiserver-authentication: {problem!r} is missing or not JSON"
            ) from problem


@dataclass(frozen=True)
class User:
    """The user that the aggregator authenticated."""

    name: str
    groups: tuple[str, ...]
    extra: Mapping[str, tuple[str, ...]]


class ExternalMetrics:
    """The server. `labels` are attached to every metric and matched against label selectors."""

    def __init__(
        self,
        last_decision: LastDecision,
        access: Access,
        front_proxy: FrontProxy,
        *,
        certificate: Path,
        key: Path,
        labels: Mapping[str, str],
        namespace: str,
        window_s: int = 60,
        refresh: Callable[[], Awaitable[FrontProxy]] | None = None,
    ) -> None:
        self._last, self._access, self._proxy = last_decision, access, front_proxy
        self._certificate, self._key = certificate, key
        self._labels, self._namespace, self._window = dict(labels), namespace, window_s
        self._refresh = refresh
        self._context = self._make_context()
        self._stamp = self._files()
        self._runner: web.AppRunner | None = None
        self._reload: asyncio.Task[None] | None = None

    # ---- lifecycle ----

    async def start(self, host: str, port: int) -> int:
        """Serve on host:port over TLS. Returns the port."""
        app = web.Application()
        for path in ("/livez", "/readyz", "/healthz"):
            app.router.add_get(path, self._health)
        app.router.add_get("/apis", self._guarded(self._groups))
        app.router.add_get(f"/apis/{GROUP}", self._guarded(self._group))
        app.router.add_get(ROOT, self._guarded(self._resources))
        app.router.add_get(ROOT + "/namespaces/{namespace}/{metric}", self._guarded(self._metric))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=self._context)
        await site.start()
        self._reload = asyncio.create_task(self._watch_files())
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._reload is not None:
            self._reload.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._certificate, self._key)
        context.verify_mode = (
            ssl.CERT_OPTIONAL
        )  # a kubelet's probe has no certificate; other clients need the front proxy's
        context.load_verify_locations(cadata=self._proxy.client_ca)
        return context

    def _files(self) -> tuple[int, int]:
        return self._certificate.stat().st_mtime_ns, self._key.stat().st_mtime_ns

    async def _watch_files(self) -> None:
        """Reload a renewed serving certificate and front proxy; open connections keep the old ones."""
        while True:
            await asyncio.sleep(_RELOAD_S)
            try:
                if self._files() != self._stamp:
                    self._context.load_cert_chain(self._certificate, self._key)
                    self._stamp = self._files()
                    log.info("serving certificate reloaded")
                if self._refresh is not None and (proxy := await self._refresh()) != self._proxy:
                    self._context.load_verify_locations(cadata=proxy.client_ca)
                    self._proxy = proxy
                    log.info("front proxy reloaded")
            except (OSError, ssl.SSLError, ValueError, ActuatorError) as problem:
                log.warning("external metrics: keeping the current certificates: %s", problem)

    # ---- authorization ----

    def _guarded(self, handler: Any) -> Any:
        async def guarded(request: web.Request) -> web.StreamResponse:
            user = self._user(request)
            if user is None:
                return _status(401, "Unauthorized", "expected a front-proxy certificate and its user header")
            try:
                allowed = await self._access.allowed(
                    user.name, user.groups, user.extra, self._attributes(request)
                )
            except ActuatorError as problem:
                log.warning("external metrics: %s", problem)
                return _status(500, "InternalError", "access review failed")
            if not allowed:
                return _status(403, "Forbidden", f"{user.name!r} may not get {request.path}")
            answer: web.StreamResponse = await handler(request)
            return answer

        return guarded

    def _user(self, request: web.Request) -> User | None:
        """The user named by the front proxy; None if the connection is not the front proxy's."""
        assert request.transport is not None
        certificate = request.transport.get_extra_info("peercert")
        if not certificate:
            return None
        names = [value for part in certificate["subject"] for key, value in part if key == "commonName"]
        if self._proxy.allowed_names and not set(names) & set(self._proxy.allowed_names):
            return None
        name = next(
            (request.headers[h] for h in self._proxy.username_headers if request.headers.get(h)), None
        )
        if name is None:
            return None
        groups = tuple(v for h in self._proxy.group_headers for v in request.headers.getall(h, []))
        extra: dict[str, tuple[str, ...]] = {}
        for prefix in self._proxy.extra_prefixes:
            for header in {h for h in request.headers if h.lower().startswith(prefix.lower())}:
                extra[header[len(prefix) :].lower()] = tuple(request.headers.getall(header))
        return User(name, groups, extra)

    def _attributes(self, request: web.Request) -> dict[str, str]:
        match = request.match_info
        if "metric" not in match:
            return {"path": request.path, "verb": "get"}
        return {
            "group": GROUP,
            "version": VERSION,
            "resource": match["metric"],
            "namespace": match["namespace"],
            "verb": "list",
        }

    # ---- responses ----

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _groups(self, request: web.Request) -> web.Response:
        return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": [_api_group()]})

    async def _group(self, request: web.Request) -> web.Response:
        return web.json_response({"kind": "APIGroup", "apiVersion": "v1", **_api_group()})

    async def _resources(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": f"{GROUP}/{VERSION}",
                "resources": [
                    {
                        "name": name,
                        "singularName": "",
                        "namespaced": True,
                        "kind": "ExternalMetricValueList",
                        "verbs": ["get"],
                    }
                    for name in METRICS
                ],
            }
        )

    async def _metric(self, request: web.Request) -> web.Response:
        metric = request.match_info["metric"]
        if metric not in METRICS:
            return _status(
                404, "NotFound", f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}"
            )
        try:
            wanted = matches(request.query.get("labelSelector", ""), self._labels)
        except ValueError as problem:
            return _status(400, "BadRequest", str(problem))
        items = []
        if wanted and request.match_info["namespace"] == self._namespace:
            value = self._last.value(metric)
            if value is None:
                return _status(503, "ServiceUnavailable", f"{metric} is missing or outdated")
            items.append(self._item(metric, value))
        body = {
            "kind": "ExternalMetricValueList",
            "apiVersion": f"{GROUP}/{VERSION}",
            "metadata": {},
            "items": items,
        }
        return web.json_response(body)

    def _item(self, metric: str, value: float) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {
            "metricName": metric,
            "metricLabels": self._labels,
            "timestamp": now,
            "window": self._window,
            "value": quantity(value),
        }


def quantity(value: float) -> str:
    """A Kubernetes quantity; fractions in thousandths, rounded up ("1900m" for 1.9)."""
    milli = math.ceil(round(value * 1000, 6))
    return str(milli // 1000) if milli % 1000 == 0 else f"{milli}m"


def matches(selector: str, labels: Mapping[str, str]) -> bool:
    """Whether labels match a selector: `a=b,c!=d,e,!f,g in (x,y),h notin (z)`.

    Raises ValueError for an invalid selector.
    """
    return all(_meets(part.strip(), labels) for part in _split(selector) if part.strip())


def _split(selector: str) -> list[str]:
    """Split at commas outside parentheses."""
    parts, depth, begin = [], 0, 0
    for position, character in enumerate(selector):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append(selector[begin:position])
            begin = position + 1
    return [*parts, selector[begin:]]


def _meets(requirement: str, labels: Mapping[str, str]) -> bool:
    for word, negated in ((" notin ", True), (" in ", False)):
        if word in requirement:
            key, _, values = requirement.partition(word)
            chosen = {
                value.strip() for value in values.strip().removeprefix("(").removesuffix(")").split(",")
            }
            return (labels.get(key.strip()) in chosen) != negated
    for operator, negated in (("!=", True), ("==", False), ("=", False)):
        if operator in requirement:
            key, _, value = requirement.partition(operator)
            return (labels.get(key.strip()) == value.strip()) != negated
    if " " in requirement:
        raise ValueError(f"invalid label selector {requirement!r}")
    return requirement[1:] not in labels if requirement.startswith("!") else requirement in labels


def _api_group() -> dict[str, Any]:
    version = {"groupVersion": f"{GROUP}/{VERSION}", "version": VERSION}
    return {"name": GROUP, "versions": [version], "preferredVersion": version}


def _status(code: int, reason: str, message: str) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": message,
        "code": code,
    }
    return web.json_response(body, status=code)
