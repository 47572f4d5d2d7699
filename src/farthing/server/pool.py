"""Several models on one machine: each is a server process, loaded when requested and unloaded for room.

A model is available -> loading -> loaded -> unloading -> available, or failed. The sizes of all that are not
available stay within the memory limit. Models without requests give way, the least recently used first. One
in use is never unloaded: if nothing else makes room, it takes no new requests once it has been loaded for a
while, and gives way when the running ones have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import signal
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from farthing.exchange import Upstream
from farthing.memory import gigabytes
from farthing.server.errors import ApiError
from farthing.server.presets import Sized
from farthing.shares import Shares
from farthing.upstream import ServerProcess, Watch, free_port, launch, signal_group

log = logging.getLogger("farthing.server")

State = Literal["available", "loading", "loaded", "unloading", "failed"]

MOST_WAITING = 1024  # requests that wait for models
_LEAST_LOADED = 10.0  # seconds for which a model takes requests before others that wait may replace it, ...
_LEAST_LOADS = 4.0  # ... and at least this many times as long as loading it took
_TURNS = 10  # ... unless loading is so slow that requests would wait too long: the stays in `wait` seconds
_PAUSES = 30.0, 3600.0  # seconds after a first failure to start, doubled by each further one up to the last
_LINES = 5  # of the output of a process that are kept
_RECORD = re.compile(r"(?:\S+ \S+ (?P<level>[A-Z]+) )?(?P<text>.*)", re.DOTALL)  # as `log_lines` writes them
_LOOK = 1.0  # seconds between looks for idle models and at their memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """limit: bytes of all models together. idle: seconds without a request, then a model is unloaded."""

    limit: int
    idle: float = 600.0
    ready_timeout: float = 3600.0  # a first start may download and pack
    drain_timeout: float = 30.0
    wait: float = 600.0  # of a request for its model


@dataclass(eq=False, slots=True)
class Hosted:
    """One model. Used only in the event loop."""

    sized: Sized
    size: int  # bytes: as planned, or as measured if that was more
    state: State = "available"
    server: ServerProcess | None = None
    users: int = 0  # requests in progress
    used: float = 0.0  # monotonic, when it last had a request
    loaded: float = 0.0  # monotonic, since when it is loaded
    took: float = 0.0  # seconds of its last load
    closing: bool = False  # takes no new requests, to make room
    keep: dict[str, float] = field(default_factory=dict)  # by client: monotonic, until when it stays loaded
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))  # last output
    failures: int = 0
    retry: float = 0.0  # monotonic, not started again before
    error: str = ""  # of the last start
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """As requests name it."""
        return self.sized.preset.name

    @property
    def held(self) -> int:
        """Bytes that it has of the limit."""
        return self.size if self.state in ("loading", "loaded", "unloading") else 0

    @property
    def kept_until(self) -> float:
        """Monotonic, when it may be unloaded as idle."""
        return max(self.keep.values(), default=self.loaded)


@dataclass(eq=False, slots=True)
class _Wait:
    """A request that waits for its model. woken: the model then counts the request as its user."""

    client: str
    model: Hosted
    woken: asyncio.Future[None]

    @property
    def granted(self) -> bool:
        """Whether the model counts it."""
        return self.woken.done() and not self.woken.cancelled() and self.woken.exception() is None


class Pool:
    """The models, and the requests that wait for them. Used only in the event loop."""

    def __init__(self, models: Iterable[Sized], config: PoolConfig, environment: Mapping[str, str]) -> None:
        """environment: of the processes, in addition to this one's."""
        self.config = config
        self.models = {each.preset.name: Hosted(each, each.size) for each in models}
        self.draining = False
        self.loads = self.unloads = 0
        self._environment = environment
        self._shares = Shares(ahead=min(each.size for each in self.models.values()))
        self._waiting: dict[_Wait, None] = {}  # in order of arrival
        self._http = Upstream(2.0, 2.0)
        self._looking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None  # looks again when a model may be closed
        self._watch = Watch(
            path="/ready",
            ready_timeout=config.ready_timeout,
            drain_timeout=config.drain_timeout,
            liveness=60.0,
        )

    @property
    def waiting(self) -> int:
        """Requests that wait for a model."""
        return len(self._waiting)

    async def start(self) -> None:
        """Begin to look for idle models."""
        self._looking = asyncio.create_task(self._look())

    async def drain(self) -> bool:
        """Refuse new requests, let running ones finish for at most `drain_timeout` seconds, and stop all
        processes. Returns whether all requests finished."""
        self.draining = True
        for wait in list(self._waiting):
            _refuse(wait, ApiError(503, "the server is shutting down", code="not_ready", retry_after=5))
        deadline = time.monotonic() + self.config.drain_timeout
        while (busy := any(each.users for each in self.models.values())) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for model in self.models.values():
            self._unload(model, "the server is shutting down")
        tasks = [each.task for each in self.models.values() if each.task is not None]
        if self._looking is not None:
            self._looking.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._http.close()
        return not busy

    # requests

    @asynccontextmanager
    async def use(self, model: Hosted, client: str, keep: float | None = None) -> AsyncIterator[str]:
        """The URL of a model's server, which stays loaded within the context; waits until it is.

        keep: for how many seconds longer the client needs it; None: the idle time at least. Others keep what
        they have. Raises ApiError: 503 if it cannot be loaded or not in time, 429 if too many requests wait.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="not_ready", retry_after=5)
        if model.state == "loaded" and not model.closing:
            self._enter(model)
        else:
            await self._wait_for(model, client)
        server = model.server
        assert server is not None
        self._keep(model, client, keep)  # also now, for a client reads its answer before the context ends
        try:
            yield server.url
        finally:
            model.users -= 1
            model.used = time.monotonic()
            if server is model.server:
                self._keep(model, client, keep)
            self._advance()

    def _keep(self, model: Hosted, client: str, keep: float | None) -> None:
        least = model.used + self.config.idle
        kept = max(least, model.keep.get(client, least)) if keep is None else model.used + keep
        model.keep[client] = kept

    async def load(self, model: Hosted, client: str) -> None:
        """Load a model, also after it failed to start. Raises ApiError as `use` does."""
        model.retry = 0.0
        async with self.use(model, client):
            pass

    def unload(self, model: Hosted) -> None:
        """Unload a model once its requests have ended. Raises ApiError (409) if requests use it now."""
        if model.users or model.state == "loading":
            raise ApiError(409, f"model: {model.name} is in use", param="model", code="model_in_use")
        self._unload(model, "requested")

    def broken(self, model: Hosted) -> None:
        """Its engine has failed: end the process, so that the next request starts another."""
        if model.server is not None:
            signal_group(model.server.process, signal.SIGKILL)

    async def ended(self, model: Hosted) -> None:
        """Wait a moment until a process that refuses connections has ended."""
        if model.task is not None:
            await asyncio.wait({model.task}, timeout=_LOOK)

    def _enter(self, model: Hosted) -> None:
        model.users += 1
        model.used = time.monotonic()

    async def _wait_for(self, model: Hosted, client: str) -> None:
        self._check_retry(model)
        if len(self._waiting) >= MOST_WAITING:
            self._make_place(client)
        wait = _Wait(client, model, asyncio.get_running_loop().create_future())
        self._shares.enter(client)
        self._waiting[wait] = None
        self._advance()
        try:
            async with asyncio.timeout(self.config.wait):
                await wait.woken
        except TimeoutError:
            if not wait.granted:  # else its turn came in the same moment
                why = f"model: {model.name} was not loaded within {self.config.wait:g} s; retry later"
                raise ApiError(503, why, code="model_not_loaded", retry_after=30) from None
        except asyncio.CancelledError:
            if wait.granted:  # the client left as its turn came
                model.users -= 1
            raise
        finally:
            self._waiting.pop(wait, None)
            self._shares.leave(client)
            self._advance()

    def _check_retry(self, model: Hosted) -> None:
        """Raises ApiError (503) for a model that failed to start a short time ago."""
        left = model.retry - time.monotonic()
        if model.error and left > 0:
            raise _failed(model, math.ceil(left))

    def _make_place(self, client: str) -> None:
        """Refuse the newest request of the client with most. Raises ApiError if that is the one to come."""
        waiting = Counter(each.client for each in self._waiting)
        waiting[client] += 1
        greediest = max(waiting, key=waiting.__getitem__)
        error = ApiError(
            429, f"{len(self._waiting)} requests wait for models", reason="queue_full", retry_after=5
        )
        if greediest == client:
            raise error
        newest = next(each for each in reversed(self._waiting) if each.client == greediest)
        _refuse(newest, error)
        del self._waiting[newest]

    # which model is next

    def _advance(self) -> None:
        """Wake the requests whose models are loaded, then load what the next client waits for.

        Clients take turns by what they had loaded before. While there is no room for the first in line, none
        overtakes it.
        """
        if self.draining:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()
        blocked = False
        while not blocked and (queue := self._queue()):
            client = self._shares.next(queue)
            model = queue[client]
            if blocked := not self._make_room(model):
                break
            self._shares.charge(client, model.size)
            self._begin(model)
        if not blocked and any(each.closing for each in self.models.values()):
            for model in self.models.values():
                model.closing = False
            self._wake()

    def _wake(self) -> None:
        for wait in list(self._waiting):
            if wait.model.state == "loaded" and not wait.model.closing:
                del self._waiting[wait]
                if not wait.woken.done():
                    self._enter(wait.model)
                    wait.woken.set_result(None)

    def _queue(self) -> dict[str, Hosted]:
        """By client, the first model it waits for that is to be loaded."""
        first: dict[str, Hosted] = {}
        for wait in self._waiting:
            if wait.model.state in ("available", "failed") and not wait.woken.done():
                first.setdefault(wait.client, wait.model)
        return first

    def _make_room(self, model: Hosted) -> bool:
        """Whether there is room for a model now; else what is idle, or will be, gives way to it."""
        held = [each for each in self.models.values() if each.held]
        lack = model.size - (self.config.limit - sum(each.held for each in held))
        if lack <= 0:
            return True
        lack -= sum(each.held for each in held if each.state == "unloading")
        loaded = sorted((each for each in held if each.state == "loaded"), key=lambda each: each.used)
        chosen: list[Hosted] = []
        for candidate in (*(m for m in loaded if not m.users), *(m for m in loaded if m.users)):
            if lack <= 0:
                break
            chosen.append(candidate)
            lack -= candidate.held
        if lack > 0:  # a model that is being loaded is in the way
            return False
        for candidate in chosen:
            if not candidate.users:
                self._unload(candidate, f"to make room for {model.name}")
            elif (left := self._least(candidate) - time.monotonic()) <= 0:
                candidate.closing = True
            elif self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(left, self._advance)
        return False

    def _least(self, model: Hosted) -> float:
        """Monotonic: from when on a model in use takes no new requests if others wait for its memory."""
        least = min(_LEAST_LOADS * model.took, self.config.wait / _TURNS)
        return model.loaded + max(_LEAST_LOADED, least)

    # processes

    def _begin(self, model: Hosted) -> None:
        log.info("%s: loading; %s of memory", model.name, gigabytes(model.size))
        model.state, model.error, model.closing = "loading", "", False
        model.lines.clear()
        model.keep.clear()
        self.loads += 1
        model.task = asyncio.create_task(self._live(model))

    async def _live(self, model: Hosted) -> None:
        """The life of a model's process."""
        port, launched = free_port("127.0.0.1"), time.monotonic()
        was, reason = "starting", ""
        try:
            process = await launch(model.sized.command(port), None, self._environment)
            server = ServerProcess(model.name, f"http://127.0.0.1:{port}", process, launched)
            model.server = server
            reading = asyncio.create_task(self._read(model, server))
            was = await server.live(self._http.status, self._watch, lambda took: self._ready(model, took))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reading, 1.0)
            reason = server.reason
        except OSError as problem:
            reason = str(problem)
        model.server, model.state, model.closing = None, "available", False
        if was in ("starting", "ready") and not self.draining:
            self._broke(model, reason, started=was == "ready")
        self._advance()

    async def _read(self, model: Hosted, server: ServerProcess) -> None:
        """Show what the process prints, except for its own address, and keep its last lines."""
        output = server.process.stdout
        assert output is not None
        while True:
            try:
                line = await output.readline()
            except ValueError:  # longer than asyncio's limit
                continue
            if not line:
                return
            said = _RECORD.fullmatch(line.decode(errors="replace").rstrip())
            assert said is not None
            if server.url in said["text"]:
                continue
            model.lines.append(said["text"])
            level = logging.getLevelNamesMapping().get(said["level"] or "", logging.INFO)
            log.log(level, "%s: %s", model.name, said["text"])

    def _ready(self, model: Hosted, took: float) -> None:
        now = time.monotonic()
        model.state, model.loaded, model.used, model.took, model.failures = "loaded", now, now, took, 0
        wanted = any(each.model is model for each in self._waiting)
        model.keep[""] = now if wanted else now + self.config.idle
        log.info("%s: loaded after %.2f s", model.name, took)
        self._advance()

    def _broke(self, model: Hosted, reason: str, started: bool) -> None:
        """A process ended by itself. One that had served is started again when a request needs it."""
        said = next((line for line in reversed(model.lines) if line.startswith("error: ")), "")
        why = said.removeprefix("error: ") or "; ".join((reason, *model.lines))
        log.error("%s: %s: %s", model.name, "ended" if started else "did not start", why)
        model.failures += 1
        if started and model.failures == 1:
            return
        model.state, model.error = "failed", why
        first, last = _PAUSES
        pause = min(last, first * 2 ** (model.failures - 1))
        model.retry = time.monotonic() + pause
        for wait in list(self._waiting):
            if wait.model is model:
                _refuse(wait, _failed(model, math.ceil(pause)))
                del self._waiting[wait]

    def _unload(self, model: Hosted, why: str) -> None:
        server = model.server
        if server is None or server.state not in ("starting", "ready"):
            return
        log.info("%s: unloading: %s", model.name, why)
        self.unloads += 1
        model.state = "unloading"
        server.drain(self.config.drain_timeout)

    # idle time and memory

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            measured = {
                each: each.server.process.pid
                for each in self.models.values()
                if each.state == "loaded" and each.server is not None
            }
            sizes = await asyncio.to_thread(_group_memory, set(measured.values()))
            for model, pid in measured.items():
                model.size = max(model.size, sizes.get(pid, 0))
            self._shrink()

    def _shrink(self) -> None:
        """Unload models that are idle for too long, and some if they have outgrown the limit together."""
        now = time.monotonic()
        idle = sorted(
            (each for each in self.models.values() if each.state == "loaded" and not each.users),
            key=lambda each: each.used,
        )
        over = sum(each.held for each in self.models.values()) - self.config.limit
        for model in idle:
            if over > 0:
                over -= model.held
                self._unload(model, "the models have outgrown the limit")
            elif now > model.kept_until:
                self._unload(model, "idle")


def _failed(model: Hosted, seconds: int) -> ApiError:
    return ApiError(
        503,
        f"model: {model.name} could not be started: {model.error}",
        param="model",
        code="model_failed",
        retry_after=seconds,
    )


def _refuse(wait: _Wait, error: ApiError) -> None:
    if not wait.woken.done():
        wait.woken.set_exception(error)


def _group_memory(groups: set[int]) -> dict[int, int]:
    """By process group, the resident bytes of its processes, in which what several share counts once. Empty
    where /proc does not tell."""
    sizes: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
            if group in groups:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                own = next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
                sizes[group] = sizes.get(group, 0) + own
    return sizes
