"""The Kubernetes API: one client for `/scale`, Lease and SubjectAccessReview, from a pod, a kubeconfig
or a URL.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import kubernetes
from kubernetes.client import ApiClient, ApiException, Configuration

from farthing.fleet.actuators.base import ActuatorError

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


async def authentication_config(client: ApiClient) -> dict[str, str]:
    """The data of ConfigMap kube-system/extension-apiserver-authentication: the front proxy."""
    core = kubernetes.client.CoreV1Api(client)
    name = "extension-apiserver-authentication"
    found: Any = await call(f"ConfigMap {name}", core.read_namespaced_config_map, name, "kube-system")
    return dict(found.data or {})


class Access:
    """SubjectAccessReview with a short-lived cache, as in other aggregated API servers."""

    def __init__(
        self, client: ApiClient, *, keep_s: float = 10.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._api = kubernetes.client.AuthorizationV1Api(client)
        self._keep, self._monotonic = keep_s, monotonic
        self._known: dict[Any, tuple[float, bool]] = {}

    async def allowed(
        self,
        user: str,
        groups: tuple[str, ...],
        extra: Mapping[str, tuple[str, ...]],
        attributes: Mapping[str, str],
    ) -> bool:
        """Whether the user may perform the action of `attributes`.

        Raises ActuatorError if the API does not answer.
        """
        key = (user, groups, tuple(sorted(extra.items())), tuple(sorted(attributes.items())))
        now = self._monotonic()
        known = self._known.get(key)
        if known is not None and now - known[0] < self._keep:
            return known[1]
        kind = "nonResourceAttributes" if "path" in attributes else "resourceAttributes"
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": user,
                "groups": list(groups),
                "extra": {name: list(values) for name, values in extra.items()},
                kind: dict(attributes),
            },
        }
        answer: Any = await call("SubjectAccessReview", self._api.create_subject_access_review, review)
        allowed = bool(answer.status.allowed)
        if len(self._known) > 1000:
            self._known.clear()
        self._known[key] = (now, allowed)
        return allowed


def timestamp(seconds: float) -> str:
    """RFC 3339 with microseconds, for Lease."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
