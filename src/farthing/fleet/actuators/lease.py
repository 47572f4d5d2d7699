"""Leader election by a Lease (coordination.k8s.io/v1), so that only one of several controllers acts.

A lease has expired when its record has not changed for its duration on the observer's monotonic clock. Clocks
of different machines are never compared, and setting a clock can neither steal nor lose a lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kubernetes
from kubernetes.client import ApiClient

from farthing.fleet.actuators.base import ActuatorError
from farthing.fleet.actuators.kubernetes import call, status_of, timestamp

log = logging.getLogger(__name__)


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
    """Takes part in an election; `leading` tells whether this controller may act."""

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
        held = lease is not None and lease.spec.holder_identity == self.config.identity
        transitions = int(lease.spec.lease_transitions or 0) if lease is not None else 0
        spec = {
            "holderIdentity": self.config.identity,
            "leaseDurationSeconds": max(1, round(self.config.duration_s)),
            "acquireTime": timestamp(lease.spec.acquire_time.timestamp())
            if held and lease.spec.acquire_time
            else now,
            "renewTime": now,
            "leaseTransitions": transitions if held or lease is None else transitions + 1,
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
