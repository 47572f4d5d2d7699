"""One request from its body to its answer: choice of a replica, retry, errors.

A request is sent to at most `tries` replicas, and never to a second one after the client has received a byte.
It is retried on another replica if the first was unreachable, answered 503 or stopped answering. If a replica
dies with the request in flight, `poison` decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from farthing.fleet.gateway.active import Active, Interrupted
from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.gateway.errors import Refused
from farthing.fleet.gateway.exchange import BUSY, Outgoing, Relay, ReplicaLost, refusal, send
from farthing.fleet.gateway.hold import Hold
from farthing.fleet.gateway.metrics import GatewayMetrics
from farthing.fleet.gateway.poison import Poison
from farthing.fleet.gateway.replicas import Balancer, Replica
from farthing.fleet.gateway.silence import Silence
from farthing.fleet.gateway.stored import find


@dataclass
class _Course:
    """Progress of one request."""

    arrived: float  # loop time
    deadline: float
    client: str
    holder: Replica | None = None  # stores the response that the request continues
    sent: int = 0  # number of replicas that received the request
    tried: list[Replica] = field(default_factory=list)
    unreached: list[Replica] = field(default_factory=list)  # those of `tried` that never received the request
    reason: str = "none is ready"
    status: int = BUSY
    held: bool = False  # it waited for a replica: a fleet that was just woken is busy at first


class Proxy:
    """Sends requests to replicas. alive: whether a replica still answers."""

    def __init__(
        self,
        config: GatewayConfig,
        balancer: Balancer,
        metrics: GatewayMetrics,
        hold: Hold,
        session: aiohttp.ClientSession,
        alive: Callable[[Replica], Awaitable[bool]],
    ) -> None:
        self._config, self._balancer, self._metrics = config, balancer, metrics
        self._hold, self._session, self._alive = hold, session, alive
        self._poison = Poison(config.poison_ttl_s)
        self.silence = Silence(config.hung_margin_s)
        self._now = asyncio.get_running_loop().time

    async def answer(
        self, request: web.BaseRequest, outgoing: Outgoing, client: str = ""
    ) -> web.StreamResponse:
        """Forward a request and return the answer. client: the name of its API key.

        Raises Refused, or OSError if the client is lost.
        """
        if self._poison.refuses(outgoing.identity):
            self._metrics.count("none", 422)
            raise Refused(
                422,
                "a replica died with this request in flight; "
                f"it is refused for {self._config.poison_ttl_s:g} s",
            )
        course = _Course(self._now(), self._now() + self._config.wait_s, client)
        if (identity := outgoing.earlier) is not None and len(self._balancer.candidates()) > 1:
            course.holder = await find(self._session, self._balancer.candidates(), identity, outgoing.headers)
        while (replica := await self._next(outgoing, course)) is not None:
            answer = await self._try(request, outgoing, replica, course)
            if answer is not None:
                return answer
            if self._hold.stopping or self._poison.refuses(outgoing.identity):
                break
            self._metrics.retries.inc()
        self._metrics.count("none", course.status)
        raise Refused(
            course.status,
            f"no replica answered the request ({course.reason}; sent to {course.sent})",
            headers={"Retry-After": "1"},
        )

    async def _next(self, outgoing: Outgoing, course: _Course) -> Replica | None:
        """The replica for the next try, waiting until one is ready. None: no more tries."""
        if course.sent >= self._config.tries:
            return None
        replica = self._balancer.choose(outgoing.prompt, course.tried)
        if course.holder is not None and not course.tried and course.holder.available:
            replica = course.holder
        if replica is None:
            replica = await self._hold.until(
                lambda: self._again(outgoing, course), course.deadline, course.client
            )
            course.held = True
        if replica is not None:
            course.tried.append(replica)
        return replica

    def _again(self, outgoing: Outgoing, course: _Course) -> Replica | None:
        """An untried replica, or one that was unreachable a moment ago and may be back."""
        passed_over = [r for r in course.tried if r not in course.unreached]
        return self._balancer.choose(outgoing.prompt, passed_over)

    async def _try(
        self, request: web.BaseRequest, outgoing: Outgoing, replica: Replica, course: _Course
    ) -> web.StreamResponse | None:
        """One try. None if the client has received nothing; `course` has the reason. Raises OSError if the
        client is lost.
        """
        with self._inflight(outgoing, replica) as active:
            try:
                return await self._exchange(request, outgoing, replica, course, active)
            except Interrupted as problem:
                replica.breaker.abandoned()
                self._interrupted(outgoing, replica, course, problem)
            except ReplicaLost as problem:
                await self._lost(outgoing, replica, course, active, problem)
            except (asyncio.CancelledError, OSError):  # the client disconnected
                replica.breaker.abandoned()
                self._metrics.count(replica.name, 499)
                raise
        return None

    async def _exchange(
        self,
        request: web.BaseRequest,
        outgoing: Outgoing,
        replica: Replica,
        course: _Course,
        active: Active,
    ) -> web.StreamResponse | None:
        """Send the request and relay the answer.

        Raises ReplicaLost and Interrupted only if the client has received nothing.
        """
        with active.interruptible():
            answer = await send(self._session, replica, outgoing)
        try:
            if answer.status == BUSY and not self._last(course):
                await self._busy(outgoing, replica, course, active, answer)
                return None
            self._first_byte(replica, active, course)
            relay = Relay(request, replica, answer, active, self._config.write_timeout_s)
            try:
                response = await relay.whole() or await relay.stream()
            except (ReplicaLost, Interrupted) as problem:
                if relay.response is None:
                    raise
                self._metrics.count(replica.name, 502)
                await self._break_off(relay, outgoing, replica, problem)
                return relay.response
        finally:
            answer.close()
        replica.served += 1
        replica.breaker.succeeded()
        self._metrics.count(replica.name, response.status)
        return response

    @contextmanager
    def _inflight(self, outgoing: Outgoing, replica: Replica) -> Iterator[Active]:
        """Count the request on its replica."""
        active = Active(outgoing.streamed, self._now(), alone=not replica.active)
        for other in replica.active:
            other.alone = False
        replica.active.add(active)
        replica.inflight += 1
        replica.breaker.sent()
        uncached = self._balancer.learn(outgoing.prompt, replica)
        # Without streaming, the first byte does not show when the prompt was computed.
        active.queued = uncached if outgoing.streamed else 0
        replica.queued += active.queued
        try:
            yield active
        finally:
            replica.active.discard(active)
            replica.inflight -= 1
            replica.queued -= active.queued

    def _first_byte(self, replica: Replica, active: Active, course: _Course) -> None:
        now = self._now()
        replica.heard = now
        active.heard = True
        replica.queued -= active.queued
        active.queued = 0
        self._metrics.first_byte.observe(now - course.arrived)
        if active.streamed:
            self.silence.observe(now - active.began)

    def _last(self, course: _Course) -> bool:
        """Whether to pass on a busy replica's own answer."""
        if course.held and self._now() < course.deadline:
            return False
        return course.sent + 1 >= self._config.tries or not self._balancer.candidates(course.tried)

    # ---- failed tries ----

    async def _break_off(
        self, relay: Relay, outgoing: Outgoing, replica: Replica, problem: ReplicaLost | Interrupted
    ) -> None:
        """End an answer that started but cannot be completed."""
        if isinstance(problem, Interrupted) and problem.why == "stopping":
            replica.breaker.abandoned()
            await relay.break_off(str(problem))
            return
        replica.failed += 1
        replica.breaker.failed()
        # The client may retry it. A long answer is also cut off by what is not its fault: a suspect at most.
        if isinstance(problem, Interrupted) or not await self._alive(replica):
            self._poison.strike(outgoing.identity, alone=False)
        await relay.break_off(f"replica lost: {problem}")

    async def _busy(
        self,
        outgoing: Outgoing,
        replica: Replica,
        course: _Course,
        active: Active,
        answer: aiohttp.ClientResponse,
    ) -> None:
        """The replica answered 503: draining, full, or its engine failed."""
        with active.interruptible():
            code = await refusal(answer)
        if code == "engine_failed":
            course.sent += 1
            course.reason = f"{replica.name}: its engine failed"
            self._poison.strike(outgoing.identity, alone=active.alone)
        else:
            course.reason = f"{replica.name} is busy or draining"
            if course.held:
                course.unreached.append(replica)  # retry it once it has capacity again
            else:
                course.sent += 1
        replica.served += 1
        replica.breaker.succeeded()

    def _interrupted(
        self, outgoing: Outgoing, replica: Replica, course: _Course, problem: Interrupted
    ) -> None:
        course.sent += 1
        course.reason = f"{replica.name}: {problem}"
        if problem.why == "hung":
            course.status = 504
            replica.failed += 1
            self._poison.strike(outgoing.identity, alone=False)

    async def _lost(
        self, outgoing: Outgoing, replica: Replica, course: _Course, active: Active, problem: ReplicaLost
    ) -> None:
        """The exchange failed. If the replica still answers health checks, it only closed the connection;
        otherwise it died, possibly because of this request.
        """
        replica.failed += 1
        replica.breaker.failed()
        course.reason = f"{replica.name}: {problem}"
        if not problem.held:
            course.unreached.append(replica)
            return
        course.sent += 1
        course.status = 502
        if not await self._alive(replica):
            self._poison.strike(outgoing.identity, alone=active.alone)
