"""Patch `/scale` of a Deployment, StatefulSet or LeaderWorkerSet (whose replica is a whole group).

An alternative to an HPA, whose tolerance of 0.1 ignores 10 -> 11. Needs `get` and `patch` on
`<resource>/scale`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kubernetes
from kubernetes.client import ApiClient

from farthing.fleet.actuators.base import ActuatorError
from farthing.fleet.actuators.kubernetes import call
from farthing.fleet.actuators.lease import Elector
from farthing.fleet.decisions import Decision

log = logging.getLogger(__name__)

KINDS = ("deployment", "statefulset", "leaderworkerset")
_LWS = ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets")


@dataclass(frozen=True)
class Target:
    """The scaled resource, such as `deployment/deepseek` in namespace `prod`."""

    kind: str
    name: str
    namespace: str

    @classmethod
    def parse(cls, text: str, namespace: str, field: str = "kubernetes.target") -> Target:
        """Parse KIND/NAME. Raises ValueError with the field and the accepted kinds."""
        kind, slash, name = text.partition("/")
        if not slash or kind.lower() not in KINDS or not name:
            raise ValueError(f"{field}: got {text!r}; expected KIND/NAME with KIND one of {', '.join(KINDS)}")
        return cls(kind.lower(), name, namespace)

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


class ScalePatch:
    """The actuator. With an elector, only the leader writes."""

    def __init__(self, client: ApiClient, target: Target, elector: Elector | None = None) -> None:
        self.target, self.elector = target, elector
        self._apps = kubernetes.client.AppsV1Api(client)
        self._custom = kubernetes.client.CustomObjectsApi(client)

    async def start(self) -> None:
        if self.elector is not None:
            await self.elector.start()

    async def current(self) -> int:
        """`spec.replicas` of the scale."""
        scale = await call(f"{self.target}/scale", *self._bound("get"))
        replicas = scale["spec"].get("replicas", 0) if isinstance(scale, dict) else scale.spec.replicas or 0
        return int(replicas)

    async def apply(self, decision: Decision) -> None:
        """Set `spec.replicas`. A follower writes nothing, nor does an unchanged decision."""
        if decision.target == decision.current:
            return
        if self.elector is not None and not self.elector.leading:
            log.info("not leading; not scaling %s", self.target)
            return
        await self.set(decision.target)
        log.info("%s: %d -> %d replicas", self.target, decision.current, decision.target)

    async def set(self, replicas: int) -> None:
        """Patch `spec.replicas`, leading or not. Raises ActuatorError."""
        await call(f"{self.target}/scale", *self._bound("patch"), {"spec": {"replicas": replicas}})

    async def close(self) -> None:
        if self.elector is not None:
            await self.elector.close()

    def _bound(self, verb: str) -> tuple[Callable[..., Any], Any, *tuple[Any, ...]]:
        """The client's function for a verb, with the arguments that identify the target."""
        target = self.target
        if target.kind == "leaderworkerset":
            group, version, plural = _LWS
            function = getattr(self._custom, f"{verb}_namespaced_custom_object_scale")
            return function, group, version, target.namespace, plural, target.name
        verb = "read" if verb == "get" else verb
        kind = {"deployment": "deployment", "statefulset": "stateful_set"}[target.kind]
        return getattr(self._apps, f"{verb}_namespaced_{kind}_scale"), target.name, target.namespace


__all__ = ["KINDS", "ActuatorError", "ScalePatch", "Target"]
