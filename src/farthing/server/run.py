"""The server process: load the model, listen, drain on SIGTERM, exit."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import json
import logging
import math
import os
import resource
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, cast

import uvicorn
from starlette.routing import Route
from starlette.types import ASGIApp

from farthing import process
from farthing.extras import how_to_install
from farthing.memory import resident, written
from farthing.process import Progress, loop_factory
from farthing.running import Running, announced
from farthing.server.app import create_app
from farthing.server.config import ServerConfig
from farthing.server.errors import ApiError
from farthing.server.guard import Connections, protocol
from farthing.server.jobs import Accounts, machine_of
from farthing.server.service import Service

if TYPE_CHECKING:
    from farthing.engine.engine import Engine


# Limits repeated log lines, so that a client can neither fill the log nor occupy the event loop with it.

PERIOD = 10.0  # seconds
MOST = 5  # records of one message in a period
_CANCELLED = "asyncio.exceptions.CancelledError"
_MESSAGES = 64  # messages counted at a time; beyond that, counting starts over


class LogLimit(logging.Filter):
    """Passes at most MOST records per message and period; the first record of the next period states how many
    were dropped. A request cancelled at shutdown is not an error and is dropped silently."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._counts: dict[str, int] = {}
        self._began = clock()
        self._held_back: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record."""
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return False
        message = str(record.msg)
        if message.rstrip().endswith(_CANCELLED):  # Ctrl-C during start-up; Starlette writes the text
            return False
        if self._clock() - self._began >= PERIOD or len(self._counts) > _MESSAGES:
            self._held_back = {m: n - MOST for m, n in self._counts.items() if n > MOST}
            self._counts, self._began = {}, self._clock()
        count = self._counts[message] = self._counts.get(message, 0) + 1
        if held_back := self._held_back.pop(message, 0):
            record.msg = f"{message} ({held_back} more were not logged)"
        return count <= MOST


# Freed memory is returned to the operating system.
#
# glibc keeps the memory of large requests after they have ended: free chunks remain between live ones
# in every thread's arena. malloc_trim(3) returns their whole pages.

_SECONDS = 10.0  # between looks at the resident memory
_GROWTH = 1.05  # resident memory over that after the last trim, for another one


class Trimmer:
    """Trims the heap when the process has grown; pages that stay in use then count as its size."""

    def __init__(self, trim: Callable[[], object], size: Callable[[], int] = resident) -> None:
        self._trim, self._size = trim, size
        self._after_last = 0

    def check(self) -> None:
        """Trim if the process has grown by more than 5 % since the last trim."""
        if self._size() > _GROWTH * self._after_last:
            self._trim()
            self._after_last = self._size()


async def keep_trimmed() -> None:
    """Check every ten seconds, until cancelled. Returns at once where the C library cannot trim."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not resident():
        return
    trimmer = Trimmer(lambda: trim(0))
    while True:
        await asyncio.sleep(_SECONDS)
        await asyncio.to_thread(trimmer.check)  # ctypes releases the GIL


log = logging.getLogger("farthing.server")

_OTHER_FILES = 128  # file descriptors reserved for everything except connections
_BACKLOG = 2048  # connections waiting to be accepted
_SWITCH_SECONDS = 0.00005  # maximum wait of the engine thread for the GIL, about 30 times per step
_CLOSE_SECONDS = 5  # grace period for connections to close after the drain
_LOOK = 0.5  # seconds between looks at the engine's health
_PATIENCE = 30.0  # seconds in which an engine may recover: a step ends late, a suspended rank resumes
_STOP_SECONDS = 10.0  # for a failed engine to end its thread and its processes


def serve(
    config: ServerConfig, model: str, load: Callable[[Progress], Engine], page: Sequence[Route] = ()
) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit status. It is 1 if the engine failed: nothing in this
    process can answer any more, and whatever supervises it starts another.

    `load` builds the engine in a separate thread while the socket already answers /health and the page says
    what it is doing. page: see `Service`. Raises OSError before loading the model if the address is in use.
    """
    listener = listen(config.host, config.port)
    sys.setswitchinterval(_SWITCH_SECONDS)
    with contextlib.closing(listener), listed(listener, model), _events(config) as follow:

        def load_followed(progress: Progress) -> Engine:
            engine = load(progress)
            follow(engine)
            return engine

        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve(Service(config, model, page), load_followed, listener))


def listed(listener: socket.socket, model: str) -> contextlib.AbstractContextManager[None]:
    """In `farthing ps`, while the block runs."""
    return announced(Running(os.getpid(), url_of(listener), model, time.time(), os.getppid()))


@contextlib.contextmanager
def _events(config: ServerConfig) -> Iterator[Callable[[Engine], None]]:
    """What announces an engine's cached blocks, if that is configured. Raises ValueError."""
    if config.kv_events is None:
        yield lambda engine: None
        return
    try:
        from farthing.server.kv_events import KvEvents
    except ImportError as problem:
        raise ValueError(f"kv_events requires {problem.name}: {how_to_install('fleet')}") from problem
    with contextlib.closing(KvEvents(config.kv_events)) as events:
        yield events.follow


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises an OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by connections, whose answers' bodies would otherwise wait until the client acknowledges the
    # head, for up to 40 ms. uvloop sets it itself; asyncio does not for accepted sockets.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(_BACKLOG)  # clients can connect while the application is built
    except OSError as error:
        listener.close()
        free = "; --port 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}{free}") from error
    return listener


class Drainable(Protocol):
    """What a server drains before it exits."""

    config: ServerConfig
    draining: bool

    async def drain(self) -> bool:
        """Refuse new requests and let running ones finish; whether all of them did."""


class Server(uvicorn.Server):
    """Uvicorn, except that SIGTERM and SIGINT drain first. While draining the server still responds, and
    /ready returns 503. A second signal exits immediately."""

    def __init__(self, config: uvicorn.Config, service: Drainable, guard: Connections) -> None:
        super().__init__(config)
        self.guard = guard
        self.service = service
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal (in the main thread, between event-loop iterations)."""
        if self.service.draining:
            self.force_exit = self.should_exit = True
            return
        self.service.draining = True
        log.info("draining for at most %g s; a second signal exits now", self.service.config.drain_timeout)
        self._loop.call_soon_threadsafe(self.begin_drain)

    def begin_drain(self) -> None:
        """Start draining; the server exits when the drain completes."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        if not await self.service.drain():
            log.warning("drain timeout: responses still in flight were ended with an error")
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the connections, then the application, which uvicorn would leave to be cancelled after a second
        signal, with a traceback."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until shutdown."""
        self._loop = asyncio.get_running_loop()
        trimming = asyncio.ensure_future(keep_trimmed())
        try:
            await super().serve(sockets)
        finally:
            trimming.cancel()


def make_server(service: Service) -> Server:
    """A server for a service; `serve(sockets=[…])` runs it."""
    return server_of(create_app(service), service)


def server_of(app: ASGIApp, service: Drainable) -> Server:
    """A server for an application."""
    limits = service.config
    guard = Connections(
        connection_limit(limits), limits.max_header_bytes, limits.header_timeout, limits.idle_timeout
    )
    errors = logging.getLogger("uvicorn.error")
    if not any(isinstance(each, LogLimit) for each in errors.filters):
        errors.addFilter(LogLimit())
    config = uvicorn.Config(
        app,
        http=cast("Any", protocol(guard)),
        ws="none",
        log_config=None,
        access_log=service.config.access_log,
        lifespan="on",
        timeout_keep_alive=math.ceil(limits.idle_timeout),
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        backlog=_BACKLOG,
        server_header=False,
        date_header=False,
    )
    return Server(config, service, guard)


def connection_limit(config: ServerConfig) -> int:
    """`max_connections`, capped by the open-file limit, which is first raised as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = config.max_connections + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limit = max(1, min(config.max_connections, soft - _OTHER_FILES))
    if limit < config.max_connections:
        log.warning("max_connections lowered to %d: the open-file limit is %d", limit, soft)
    return limit


async def _serve(service: Service, load: Callable[[Progress], Engine], listener: socket.socket) -> int:
    config = service.config
    loop = asyncio.get_running_loop()
    failure: list[BaseException] = []
    url = url_of(listener)

    def load_engine() -> None:
        try:
            engine = load(lambda *step: setattr(service, "loading", step))
            machine = machine_of(engine.device, config.prices, config.hardware)
            service.accounts = Accounts(engine, machine, service.names[0])
            if engine.tokenizer is not None:
                engine.tokenizer.prepare()
            if engine.disk_folder is not None:
                service.answers.persist(engine.disk_folder)
        except BaseException as error:
            failure.append(error)
            loop.call_soon_threadsafe(lambda: setattr(server, "should_exit", True))  # once there is a server
            return
        gc.freeze()  # the model's objects are permanent: exclude them from GC
        service.launch_to_ready, service.written_at_ready = process.seconds(), written()
        service.engine = engine
        if engine.tokenizer is not None and engine.sandbox and not engine.tokenizer.trusted_template:
            engine.sandbox.start()  # chat templates come from the model, so they are rendered in the sandbox
        log.info("ready after %.2f s", service.launch_to_ready)
        process.remember("serve")
        asyncio.run_coroutine_threadsafe(_announce(service, url), loop)

    loader = threading.Thread(target=load_engine, name="load", daemon=True)
    loader.start()  # in parallel with building the application
    server = make_server(service)
    log.info("listening on %s", url)
    watching = asyncio.ensure_future(_end_if_broken(service, server))
    broken = False
    try:
        await server.serve([listener])
    finally:
        broken = watching.done()
        watching.cancel()
        if service.engine is not None:
            await (_abandon if broken else asyncio.to_thread)(service.engine.shutdown)
            await asyncio.to_thread(service.answers.close)
        gc.unfreeze()  # so that native weights are freed at shutdown; otherwise nanobind reports leaks
    if failure:
        raise failure[0]
    return int(broken)


async def _end_if_broken(service: Service, server: Server) -> None:
    """Return, and end the server, once its engine has failed, or has been unhealthy for long. The errors of
    requests are sent first."""
    healthy = time.monotonic()
    while True:
        await asyncio.sleep(_LOOK)
        reason = service.broken()
        if reason is None:
            healthy = time.monotonic()
        elif service.engine is not None and (service.engine.ended or time.monotonic() - healthy > _PATIENCE):
            log.critical("%s; this process ends, for a supervisor to start another", reason)
            server.should_exit = True
            return


async def _abandon(shutdown: Callable[[], None]) -> None:
    """Shut a failed engine down. Where its thread hangs in a step, end the process without it."""
    stopping = threading.Thread(target=shutdown, name="shutdown", daemon=True)
    stopping.start()
    deadline = time.monotonic() + _STOP_SECONDS
    while stopping.is_alive():
        if time.monotonic() > deadline:
            log.critical("the engine does not end: exiting without it")
            logging.shutdown()
            os._exit(1)
        await asyncio.sleep(0.05)


def url_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def _announce(service: Service, url: str) -> None:
    """Probe the template and log the chat format; then say where the model is."""
    with contextlib.suppress(ApiError):  # the engine failed, or the server ends
        await service.formats()
        say_where(url, service.names[0], service.config)


def say_where(url: str, model: str, config: ServerConfig) -> None:
    """Log where a person and a program find a model."""
    for any_address in ("0.0.0.0", "[::]"):
        url = url.replace(any_address, "127.0.0.1")
    key = ' -H "Authorization: Bearer $KEY"' if config.keys else ""
    messages = [{"role": "user", "content": "Hello"}]
    body = shlex.quote(json.dumps({"model": model, "messages": messages}))
    log.info("page: %s/", url)
    log.info("curl %s/v1/chat/completions%s -H 'Content-Type: application/json' -d %s", url, key, body)


assert signal.SIGTERM in uvicorn.server.HANDLED_SIGNALS
