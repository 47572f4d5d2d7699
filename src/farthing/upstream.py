"""Server processes behind a proxy, from launch to exit.

The fleet's local replicas and the models of `farthing serve --models` share this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

log = logging.getLogger(__name__)

# Child processes in their own group, which end when the parent ends.

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Runs in the child before exec: SIGTERM when the parent ends, even by SIGKILL (Linux prctl(2); no-op
    elsewhere).
    """
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


async def launch(
    command: Sequence[str],
    output: Path | None,
    environment: Mapping[str, str],
    *,
    pass_fds: Sequence[int] = (),
    stdin: int = asyncio.subprocess.DEVNULL,
) -> asyncio.subprocess.Process:
    """Start a command. output: the file that its output is appended to, or discarded if the disk is full;
    None: a pipe, as the process's `stdout`.

    Raises OSError if it cannot be started.
    """
    with contextlib.ExitStack() as opened:
        to = asyncio.subprocess.PIPE if output is None else opened.enter_context(_opened(output))
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=stdin,
            stdout=to,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=_die_with_parent,
            pass_fds=tuple(pass_fds),
        )


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("ab")
    except OSError as problem:
        log.warning("%s cannot be written (%s); its output is discarded", file, problem.strerror)
        return Path(os.devnull).open("ab")


def signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal to a child's whole group; ignores a group that is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def free_port(host: str) -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


# The life of a server process: starting (no answer yet) -> ready -> draining (no new requests, SIGTERM,
# in-flight requests finish) -> gone.

Probe = Callable[[str, str], Awaitable[int | None]]  # (URL, path) -> status of a GET; None without an answer
State = Literal["starting", "ready", "draining", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How a server process is monitored. Times in seconds."""

    path: str  # answers 200 once it is ready
    ready_timeout: float
    drain_timeout: float
    liveness: float  # a ready server silent for this long is killed
    poll: float = 0.05  # between health checks while it starts


@dataclass(eq=False)
class ServerProcess:
    """A server as a child process."""

    name: str
    url: str
    process: asyncio.subprocess.Process
    launched: float  # monotonic
    state: State = "starting"
    reason: str = ""  # why it is gone

    async def live(self, probe: Probe, watch: Watch, on_ready: Callable[[float], None]) -> State:
        """Manage the process until it has exited. Returns its last state before that: "starting" if it never
        became ready, "ready" if it died, and "draining". on_ready: gets the seconds since the launch."""
        ended = asyncio.create_task(self.process.wait())
        was: State = "starting"
        try:
            if await self._becomes_ready(probe, watch, ended, on_ready):
                await self._stays_alive(probe, watch, ended)
        finally:
            was = await self._end(ended, watch.drain_timeout)
        return was

    def drain(self, timeout: float, handover: float = 0.0) -> None:
        """Send SIGTERM after `handover` seconds, for a proxy to learn of it, and SIGKILL after `timeout`."""
        self.state = "draining"
        loop = asyncio.get_running_loop()
        loop.call_later(handover, signal_group, self.process, signal.SIGTERM)
        loop.call_later(timeout, self._kill, timeout)

    async def _becomes_ready(
        self,
        probe: Probe,
        watch: Watch,
        ended: asyncio.Task[int],
        on_ready: Callable[[float], None],
    ) -> bool:
        deadline = self.launched + watch.ready_timeout
        while self.state == "starting" and not ended.done():
            if await probe(self.url, watch.path) == 200:
                if self.state == "starting":  # else it was told to drain meanwhile
                    self.state = "ready"
                    on_ready(time.monotonic() - self.launched)
                return True
            if time.monotonic() > deadline:
                self.reason = f"not ready after {watch.ready_timeout:g} s"
                return False
            await asyncio.wait([ended], timeout=watch.poll)
        return self.state == "draining"

    async def _stays_alive(self, probe: Probe, watch: Watch, ended: asyncio.Task[int]) -> None:
        """Wait until the process ends or has not answered for `liveness` seconds (hung)."""
        answered = time.monotonic()
        while not ended.done():
            await asyncio.wait([ended], timeout=watch.liveness / 10)
            if self.state == "draining" or await probe(self.url, watch.path) is not None:
                answered = time.monotonic()
            elif time.monotonic() - answered > watch.liveness and not ended.done():
                self.reason = f"no answer for {watch.liveness:g} s"
                signal_group(self.process, signal.SIGKILL)
                await ended

    async def _end(self, ended: asyncio.Task[int], timeout: float) -> State:
        """Reap the process, or stop it: SIGTERM, then after the timeout SIGKILL to its whole group."""
        was = self.state
        if not ended.done():
            signal_group(self.process, signal.SIGTERM)
            await asyncio.wait([ended], timeout=timeout)
        signal_group(self.process, signal.SIGKILL)  # also any children left in its group
        code = await ended
        self.state = "gone"
        if not self.reason and was != "draining":
            died = f"died with {code}" if was == "ready" else f"ended with {code} before it was ready"
            self.reason = died
        return was

    def _kill(self, timeout: float) -> None:
        if self.state == "draining":
            log.warning("%s did not drain within %g s; killed", self.name, timeout)
            signal_group(self.process, signal.SIGKILL)
