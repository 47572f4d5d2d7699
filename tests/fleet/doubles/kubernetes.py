"""A fake Kubernetes API over HTTP: /scale, Lease with resourceVersion conflicts, SubjectAccessReview."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

_SCALES = {
    "deployments": "apps/v1",
    "statefulsets": "apps/v1",
    "leaderworkersets": "leaderworkerset.x-k8s.io/v1",
}


class FakeKubernetes:
    """`replicas[(plural, namespace, name)]` is the state; `down` answers 500 to all."""

    def __init__(self) -> None:
        self.replicas: dict[tuple[str, str, str], int] = {}
        self.patches: list[tuple[str, int]] = []
        self.leases: dict[tuple[str, str], dict[str, Any]] = {}
        self.down = False
        self.version = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> FakeKubernetes:
        app = web.Application(middlewares=[self._maybe_down])
        lease = "/apis/coordination.k8s.io/v1/namespaces/{ns}/leases"
        app.router.add_post(lease, self._create_lease)
        app.router.add_get(lease + "/{name}", self._get_lease)
        app.router.add_put(lease + "/{name}", self._put_lease)
        for plural, group in _SCALES.items():
            path = f"/apis/{group}/namespaces/{{ns}}/{{plural:{plural}}}/{{name}}/scale"
            app.router.add_get(path, self._get_scale)
            app.router.add_patch(path, self._patch_scale)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @web.middleware
    async def _maybe_down(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.down:
            return _status(500, "InternalError")
        answer: web.StreamResponse = await handler(request)
        return answer

    # ---- /scale ----

    def _scale(self, request: web.Request) -> tuple[tuple[str, str, str], dict[str, Any]]:
        key = (request.match_info["plural"], request.match_info["ns"], request.match_info["name"])
        if key not in self.replicas:
            raise web.HTTPNotFound(text=json.dumps({"kind": "Status", "code": 404, "reason": "NotFound"}))
        metadata = {"name": key[2], "namespace": key[1]}
        count = self.replicas[key]
        return key, {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": metadata,
            "spec": {"replicas": count},
            "status": {"replicas": count},
        }

    async def _get_scale(self, request: web.Request) -> web.Response:
        return web.json_response(self._scale(request)[1])

    async def _patch_scale(self, request: web.Request) -> web.Response:
        key, _ = self._scale(request)
        kinds = (
            "application/merge-patch+json",
            "application/strategic-merge-patch+json",
            "application/json-patch+json",
        )
        if request.content_type not in kinds:
            return _status(415, "UnsupportedMediaType")
        patch = await request.json()
        if isinstance(patch, list) or request.content_type == "application/json-patch+json":
            return _status(400, "BadRequest")  # a merge patch sent as a JSON patch
        self.replicas[key] = patch["spec"]["replicas"]
        self.patches.append((key[2], self.replicas[key]))
        return web.json_response(self._scale(request)[1])

    # ---- Lease ----

    async def _create_lease(self, request: web.Request) -> web.Response:
        body = await request.json()
        key = (request.match_info["ns"], body["metadata"]["name"])
        if key in self.leases:
            return _status(409, "AlreadyExists")
        return self._store(key, body, 201)

    async def _get_lease(self, request: web.Request) -> web.Response:
        key = (request.match_info["ns"], request.match_info["name"])
        return web.json_response(self.leases[key]) if key in self.leases else _status(404, "NotFound")

    async def _put_lease(self, request: web.Request) -> web.Response:
        key, body = (request.match_info["ns"], request.match_info["name"]), await request.json()
        if key not in self.leases:
            return _status(404, "NotFound")
        if body["metadata"].get("resourceVersion") != self.leases[key]["metadata"]["resourceVersion"]:
            return _status(409, "Conflict")
        return self._store(key, body, 200)

    def _store(self, key: tuple[str, str], body: dict[str, Any], status: int) -> web.Response:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.leases[key] = body
        return web.json_response(body, status=status)

    # ---- SubjectAccessReview ----


def _status(code: int, reason: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "reason": reason}, status=code)
