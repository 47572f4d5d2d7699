"""One request from its body to its answer: choice of a replica, exchange, retry, errors.

A request is sent to at most `tries` replicas, and never to a second one after the client has received a
byte. It is retried on another replica if the first was unreachable, answered 503 or stopped answering. If
a replica dies with the request in flight, `poison` decides.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from multidict import CIMultiDict

from farthing.exchange import Answer, ReplicaLost, Upstream, end_to_end, holder, named, request_headers
from farthing.prompts import Prompt, read_prompt
from farthing.server.errors import CODE_HEADER, OPENING_HEADER, Passage
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.errors import Refused
from farthing_fleet.gateway.guard import guard_of
from farthing_fleet.gateway.hold import Holds
from farthing_fleet.gateway.metrics import GatewayMetrics
from farthing_fleet.gateway.models import check_model
from farthing_fleet.gateway.replicas import (
    Active,
    Balancer,
    Identity,
    Interrupted,
    Poison,
    Replica,
    Silence,
)

BUSY: Final = 503  # answered before the first token by a replica that drains or is full
_WHOLE = 1 << 20  # bytes; shorter answers of known length are read completely before relaying
_ENGINE_FAILED = "engine_failed"  # code of a server's 503 once its engine has failed
_REFUSAL = 16 << 10  # maximum bytes of an error answer to inspect
_OPENS_AFTER = "15"  # seconds of a long prompt in which the request can still go to another replica


@dataclass(frozen=True)
class Outgoing:
    """A request to forward to a replica."""

    method: str
    target: str  # path and query, as received
    headers: CIMultiDict[str]
    body: bytes
    prompt: Prompt

    @property
    def streamed(self) -> bool:
        """Whether the request is for a stream."""
        return self.prompt.streamed

    @property
    def earlier(self) -> str | None:
        """The id of a stored response that the request names, in its path or its body."""
        return named(self.target) or self.prompt.previous

    @property
    def identity(self) -> Identity:
        """The key of requests that are equal to a replica."""
        return self.method, self.target, self.body


def outgoing(request: web.BaseRequest, body: bytes, peer: str, config: GatewayConfig) -> Outgoing:
    """What a replica receives of a client's request."""
    headers = request_headers(request.headers.items(), peer)
    headers[OPENING_HEADER] = _OPENS_AFTER
    prompt = read_prompt(body, config.prefix_blocks, config.prefix_block)
    return Outgoing(request.method, request.rel_url.raw_path_qs, headers, body, prompt)


async def refusal(answer: Answer) -> str:
    """The code of an error answer, or an empty string. Raises ReplicaLost."""
    if code := answer.headers.get(CODE_HEADER):
        return code
    try:
        return str(json.loads(await answer.read(_REFUSAL))["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


class Relay:
    """Relays a replica's answer to the client."""

    def __init__(
        self,
        request: web.BaseRequest,
        replica: Replica,
        answer: Answer,
        active: Active,
        write_timeout_s: float,
    ) -> None:
        self._request, self._replica, self._answer, self._active = request, replica, answer, active
        self._write_timeout_s = write_timeout_s
        self._clock = asyncio.get_running_loop().time
        self._length = _content_length(answer)
        self._passage = Passage(answer.headers, request.path)
        self.response: web.StreamResponse | None = None  # set once the head is sent to the client

    async def whole(self) -> web.Response | None:
        """The complete answer if it is short and not a stream, so that the replica may still be lost safely.

        Raises ReplicaLost, Interrupted.
        """
        if self._passage.events or self._length is None or self._length > _WHOLE:
            return None
        with self._active.interruptible():
            body = await self._answer.read(self._length)
        return web.Response(status=self._answer.status, headers=self._headers(), body=body)

    async def stream(self) -> web.StreamResponse:
        """Relay the answer as it arrives; a slow client slows the replica down.

        Raises ReplicaLost and Interrupted, after which the caller calls `break_off`, and OSError if the
        client is lost.
        """
        response = web.StreamResponse(status=self._answer.status, headers=self._headers())
        if self._length is not None:
            response.content_length = self._length
        await response.prepare(self._request)
        self.response = response
        while data := await self._read():
            await self._write(response, data)
            self._passage.passed(data)
        if self._passage.events and self._unframed() and not self._passage.done:
            raise ReplicaLost("the stream ended without [DONE]", reached=True)
        await response.write_eof()
        return response

    async def break_off(self, reason: str) -> None:
        """Tell the client that a started answer will not be completed."""
        guard = guard_of(self._request)
        ending = self._passage.ending(reason)
        if self.response is not None and ending is not None:
            self.response.force_close()
            await self.response.write(ending)
            await self.response.write_eof()
        elif guard is not None:
            guard.abort()

    async def _read(self) -> bytes:
        with self._active.interruptible():
            data = await self._answer.part()
        self._replica.heard = self._clock()
        return data

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        if not self._request.protocol.writing_paused:
            await response.write(data)
            return
        try:
            with self._active.interruptible():
                async with asyncio.timeout(self._write_timeout_s):
                    await response.write(data)
        except TimeoutError as problem:
            raise ConnectionResetError("the client stopped reading") from problem

    def _headers(self) -> CIMultiDict[str]:
        headers = end_to_end(self._answer.headers.items())
        headers["X-Farthing-Replica"] = self._replica.name
        headers.setdefault("Server", "farthing")
        if (target := headers.get("Location", "")).startswith(self._replica.url + "/"):
            headers["Location"] = target.removeprefix(self._replica.url)  # not reachable for clients
        if self._request.method == "HEAD" and self._length is not None:
            headers["Content-Length"] = str(self._length)
        return headers

    def _unframed(self) -> bool:
        """Whether the body ends with the connection, which cannot be told from a killed replica."""
        return self._length is None and "chunked" not in self._answer.headers.get("Transfer-Encoding", "")


def _content_length(answer: Answer) -> int | None:
    value = answer.headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdigit() else None


@dataclass
class _Course:
    """One request and its progress."""

    request: web.BaseRequest
    outgoing: Outgoing
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
        holds: Holds,
        upstream: Upstream,
        alive: Callable[[Replica], Awaitable[bool]],
    ) -> None:
        self._config, self._balancer, self._metrics = config, balancer, metrics
        self._holds, self._upstream, self._alive = holds, upstream, alive
        self._poison = Poison(config.poison_ttl_s)
        self._silences: dict[str, Silence] = {}
        self._now = asyncio.get_running_loop().time

    def silence(self, pool: str) -> Silence:
        """How long the replicas of a pool may be silent."""
        return self._silences.setdefault(pool, Silence(self._config.hung_margin_s))

    async def answer(
        self, request: web.BaseRequest, outgoing: Outgoing, client: str = ""
    ) -> web.StreamResponse:
        """Forward a request and return the answer. client: the name of its API key.

        Raises Refused, or OSError if the client is lost.
        """
        if self._poison.refuses(outgoing.identity):
            self._metrics.count(self._balancer.pool(outgoing.prompt.model), "none", 422)
            raise Refused(
                422,
                "replicas died twice with this request in flight; "
                f"it is refused for {self._config.poison_ttl_s:g} s",
            )
        course = _Course(request, outgoing, self._now(), self._now() + self._config.wait_s, client)
        if (identity := outgoing.earlier) is not None:
            course.holder = await self._holder(identity, outgoing)
        while (replica := await self._next(course)) is not None:
            answer = await self._try(replica, course)
            if answer is not None:
                return answer
            if self._holds.stopping:
                break
            if self._poison.refuses(outgoing.identity):
                course.reason += ", perhaps because of it"
                break
            self._metrics.retries.inc()
        self._metrics.count(self._balancer.pool(outgoing.prompt.model), "none", course.status)
        raise Refused(
            course.status,
            f"no replica answered the request ({course.reason}; sent to {course.sent})",
            headers={"Retry-After": "1"},
        )

    async def _holder(self, identity: str, outgoing: Outgoing) -> Replica | None:
        replicas = self._balancer.candidates(model=outgoing.prompt.model)
        if len(replicas) < 2:
            return None
        index = await holder(self._upstream, [each.url for each in replicas], identity, outgoing.headers)
        return None if index is None else replicas[index]

    async def _next(self, course: _Course) -> Replica | None:
        """The replica for the next try, waiting until one is ready. None: no more tries."""
        if course.sent >= self._config.tries:
            return None
        prompt = course.outgoing.prompt
        replica = self._balancer.choose(prompt, course.tried)
        if course.holder is not None and not course.tried and course.holder.available:
            replica = course.holder
        if replica is None:
            hold = self._holds[self._balancer.pool(prompt.model)]
            replica = await hold.until(lambda: self._again(course), course.deadline, course.client)
            course.held = True
        if replica is not None:
            course.tried.append(replica)
        return replica

    def _again(self, course: _Course) -> Replica | None:
        """An untried replica, or one that was unreachable a moment ago and may be back. Raises Refused."""
        check_model(self._balancer, course.outgoing.prompt.model)
        passed_over = [r for r in course.tried if r not in course.unreached]
        return self._balancer.choose(course.outgoing.prompt, passed_over)

    async def _try(self, replica: Replica, course: _Course) -> web.StreamResponse | None:
        """One try. None if the client has received nothing; `course` has the reason. Raises OSError if the
        client is lost.
        """
        with self._inflight(course.outgoing, replica) as active:
            try:
                return await self._exchange(replica, course, active)
            except Interrupted as problem:
                replica.breaker.abandoned()
                self._interrupted(replica, course, active, problem)
            except ReplicaLost as problem:
                await self._lost(replica, course, active, problem)
            except (asyncio.CancelledError, OSError):  # the client disconnected
                replica.breaker.abandoned()
                self._metrics.count(replica.pool, replica.name, 499)
                raise
        return None

    async def _exchange(self, replica: Replica, course: _Course, active: Active) -> web.StreamResponse | None:
        """Send the request and relay the answer.

        Raises ReplicaLost and Interrupted only if the client has received nothing.
        """
        sent = course.outgoing
        with active.interruptible():
            answer = await self._upstream.send(replica.url, sent.method, sent.target, sent.headers, sent.body)
        try:
            if answer.status == BUSY:
                if answer.headers.get(CODE_HEADER) == _ENGINE_FAILED:
                    self._engine_failed(replica, course, active)
                if not self._last(course):
                    await self._busy(replica, course, active, answer)
                    return None
            self._first_byte(replica, active, course)
            if answer.status == 404:  # perhaps it was restarted with another model
                replica.read = False
            relay = Relay(course.request, replica, answer, active, self._config.write_timeout_s)
            try:
                response = await relay.whole() or await relay.stream()
            except (ReplicaLost, Interrupted) as problem:
                if relay.response is None:
                    raise
                self._metrics.count(replica.pool, replica.name, 502)
                await self._break_off(relay, course, replica, active, problem)
                return relay.response
        finally:
            answer.close()
        replica.served += 1
        replica.breaker.succeeded()
        if response.status < 500:
            self._poison.acquit(course.outgoing.identity)
        self._metrics.count(replica.pool, replica.name, response.status)
        return response

    @contextmanager
    def _inflight(self, outgoing: Outgoing, replica: Replica) -> Iterator[Active]:
        """Count the request on its replica."""
        active = Active(outgoing.streamed, self._now(), life=replica.life)
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
        self._metrics.first_byte.labels(replica.pool).observe(now - course.arrived)
        if active.streamed:
            self.silence(replica.pool).observe(now - active.began)

    def _last(self, course: _Course) -> bool:
        """Whether to pass on a busy replica's own answer."""
        if course.held and self._now() < course.deadline:
            return False
        model = course.outgoing.prompt.model
        return course.sent + 1 >= self._config.tries or not self._balancer.candidates(course.tried, model)

    # ---- failed tries ----

    async def _break_off(
        self,
        relay: Relay,
        course: _Course,
        replica: Replica,
        active: Active,
        problem: ReplicaLost | Interrupted,
    ) -> None:
        """End an answer that started but cannot be completed."""
        if isinstance(problem, Interrupted) and problem.why == "stopping":
            replica.breaker.abandoned()
            await relay.break_off(str(problem))
            return
        replica.failed += 1
        replica.breaker.failed()
        if isinstance(problem, Interrupted) or not await self._alive(replica):
            self._poison.strike(course.outgoing.identity, active.life)
        await relay.break_off(f"replica lost: {problem}")

    async def _busy(self, replica: Replica, course: _Course, active: Active, answer: Answer) -> None:
        """The replica answered 503: draining, full, or its engine failed."""
        with active.interruptible():
            code = await refusal(answer)
        if code == _ENGINE_FAILED:
            course.sent += 1
            course.reason = f"{replica.name}: its engine failed"
            self._engine_failed(replica, course, active)
        else:
            course.reason = f"{replica.name} is busy or draining"
            if course.held:
                course.unreached.append(replica)  # retry it once it has capacity again
            else:
                course.sent += 1
        replica.served += 1
        replica.breaker.succeeded()

    def _engine_failed(self, replica: Replica, course: _Course, active: Active) -> None:
        """The next health check that succeeds begins another life: of another process, or of another engine
        behind a server of several models, which stays healthy.
        """
        self._poison.strike(course.outgoing.identity, active.life)
        replica.healthy = False

    def _interrupted(self, replica: Replica, course: _Course, active: Active, problem: Interrupted) -> None:
        course.sent += 1
        course.reason = f"{replica.name}: {problem}"
        if problem.why == "hung":
            course.status = 504
            replica.failed += 1
            self._poison.strike(course.outgoing.identity, active.life)

    async def _lost(self, replica: Replica, course: _Course, active: Active, problem: ReplicaLost) -> None:
        """The exchange failed. If the replica still answers health checks, it only closed the connection;
        otherwise it died, possibly because of this request.
        """
        replica.failed += 1
        replica.breaker.failed()
        course.reason = f"{replica.name}: {problem}"
        if not problem.reached:
            course.unreached.append(replica)
            return
        course.sent += 1
        course.status = 502
        if not await self._alive(replica):
            self._poison.strike(course.outgoing.identity, active.life)
