"""Scaling through the Kubernetes API: one client, patches of `/scale`, and leader election by a Lease."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import kubernetes
from kubernetes.client import ApiClient, ApiException, Configuration

from farthing_fleet.actuators.base import ActuatorError
from farthing_fleet.types import Decision

log = logging.getLogger(__name__)
T = TypeVar("T")

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT_S = 5.0  # per call


def connect(api: str = "auto", context: str | None = None) -> ApiClient:
    """A client. `api`: "auto", "kubeconfig", or a URL.

    auto: the pod's service account; the kubeconfig outside a pod, or if `context` is set.

    Raises ActuatorError with what is missing.
    """
    config: Any = kubernetes.config  # untyped
    configuration = Configuration()
    try:
        if api.startswith(("http://", "https://")):
            configuration.host = api
        elif api == "kubeconfig" or (api == "auto" and (context is not None or not _in_pod())):
            config.load_kube_config(client_configuration=configuration, context=context)
        elif api == "auto":
            config.load_incluster_config(client_configuration=configuration)
        else:
            raise ActuatorError(f"kubernetes: got {api!r}; expected auto, kubeconfig or a URL")
    except config.ConfigException as problem:
        raise ActuatorError(f"no Kubernetes API is configured: {problem}") from problem
    configuration.retries = 0  # the controller retries at its next step
    return ApiClient(configuration)


def _in_pod() -> bool:
    """Whether the API server's address is in the environment, as in every pod."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def pod_namespace() -> str:
    """The namespace this pod runs in; "default" outside a pod."""
    return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else "default"


async def call(what: str, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """One API call in a thread.

    Raises ActuatorError; its cause is the ApiException if the server answered.
    """
    try:
        return await asyncio.to_thread(function, *arguments, _request_timeout=TIMEOUT_S, **options)
    except ApiException as problem:
        said = (problem.body or b"") if isinstance(problem.body, (str, bytes)) else b""
        raise ActuatorError(f"{what}: HTTP {problem.status} {problem.reason} {str(said)[:200]}") from problem
    except Exception as problem:  # urllib3 and ssl raise many types; all mean that the API did not answer
        raise ActuatorError(
            f"{what}: the Kubernetes API does not answer ({type(problem).__name__}: {problem})"
        ) from problem


def status_of(error: ActuatorError) -> int | None:
    """The HTTP status behind an error of `call`; None if there was no answer."""
    cause = error.__cause__
    return cause.status if isinstance(cause, ApiException) else None


def timestamp(seconds: float) -> str:
    """RFC 3339 with microseconds, for Lease."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class LeaseConfig:
    """Names and times of the election.

    A leader that cannot renew stops acting before another can take over.
    """

    name: str
    namespace: str
    identity: str
    duration_s: float = 15.0
    renew_s: float = 10.0  # a leader that fails to renew for this long steps down
    retry_s: float = 2.0

    def __post_init__(self) -> None:
        if not self.retry_s < self.renew_s < self.duration_s:
            times = f"{self.retry_s:g} < {self.renew_s:g} < {self.duration_s:g}"
            raise ValueError(f"LeaseConfig: got {times}; expected retry_s < renew_s < duration_s")


class Elector:
    """Takes part in an election; `leading` tells whether this controller may act.

    A lease has expired when its record has not changed for its duration on the observer's monotonic clock.
    Clocks of different machines are never compared, and setting a clock can neither steal nor lose a lease.
    """

    def __init__(
        self,
        client: ApiClient,
        config: LeaseConfig,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self._api = kubernetes.client.CoordinationV1Api(client)
        self._monotonic, self._wall = monotonic, wall
        self._renewed: float | None = None  # when our lease was last confirmed
        self._seen: tuple[str, str] | None = None  # the last observed record
        self._seen_at = 0.0  # when it was first observed
        self._task: asyncio.Task[None] | None = None

    @property
    def leading(self) -> bool:
        return self._renewed is not None and self._monotonic() - self._renewed < self.config.renew_s

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Leave the election and release a held lease, so that the next leader does not wait."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.leading:
            with contextlib.suppress(ActuatorError):
                await self._release()
        self._renewed = None

    async def _run(self) -> None:
        while True:
            before = self.leading
            try:
                await self.turn()
            except ActuatorError as problem:
                log.warning("lease: %s", problem)
            if self.leading != before:
                log.info("lease %s: %s", self.config.name, "leading" if self.leading else "not leading")
            await asyncio.sleep(self.config.retry_s)

    async def turn(self) -> None:
        """Check the lease once, and take or renew it if possible.

        Raises ActuatorError if the API does not answer.
        """
        began = self._monotonic()
        where = (self.config.name, self.config.namespace)
        try:
            lease: Any = await call("Lease", self._api.read_namespaced_lease, *where)
        except ActuatorError as problem:
            if status_of(problem) != 404:
                raise
            await self._write(began, None)
            return
        spec = lease.spec
        record = (str(spec.holder_identity or ""), str(spec.renew_time))
        if record != self._seen:
            self._seen, self._seen_at = record, began
        holder = record[0]
        expired = began - self._seen_at >= float(spec.lease_duration_seconds or self.config.duration_s)
        if holder in ("", self.config.identity) or expired:
            await self._write(began, lease)
        else:
            self._renewed = None

    async def _write(self, began: float, lease: Any) -> None:
        """Create or replace the lease with ourselves as holder; resourceVersion resolves races."""
        now = timestamp(self._wall())
        is_ours = lease is not None and lease.spec.holder_identity == self.config.identity
        transitions = int(lease.spec.lease_transitions or 0) if lease is not None else 0
        spec = {
            "holderIdentity": self.config.identity,
            "leaseDurationSeconds": max(1, round(self.config.duration_s)),
            "acquireTime": timestamp(lease.spec.acquire_time.timestamp())
            if is_ours and lease.spec.acquire_time
            else now,
            "renewTime": now,
            "leaseTransitions": transitions if is_ours or lease is None else transitions + 1,
        }
        await self._put(lease, spec)
        self._renewed = began

    async def _put(self, lease: Any, spec: dict[str, Any]) -> None:
        metadata: dict[str, Any] = {"name": self.config.name, "namespace": self.config.namespace}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        where = (self.config.name, self.config.namespace)
        try:
            if lease is None:
                await call("Lease", self._api.create_namespaced_lease, self.config.namespace, body)
            else:
                metadata["resourceVersion"] = lease.metadata.resource_version
                await call("Lease", self._api.replace_namespaced_lease, *where, body)
        except ActuatorError as problem:
            if status_of(problem) == 409:  # another controller was faster
                self._renewed = None
            raise

    async def _release(self) -> None:
        lease: Any = await call(
            "Lease", self._api.read_namespaced_lease, self.config.name, self.config.namespace
        )
        if lease.spec.holder_identity == self.config.identity:
            await self._put(
                lease, {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": timestamp(self._wall())}
            )


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
    """The actuator. With an elector, only the leader writes.

    Unlike an HPA, whose tolerance of 0.1 ignores 10 -> 11, it sets every number. Needs `get` and `patch` on
    `<resource>/scale`.
    """

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
