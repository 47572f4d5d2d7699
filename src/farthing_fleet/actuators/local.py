"""Replicas as processes on this machine: started, monitored, replaced, drained.

States: starting (process runs, no answer yet) -> ready -> draining (no new requests, SIGTERM, in-flight
requests finish) -> gone. A replica that dies is replaced at once. After repeated failures to start, launches
pause, and the pause doubles.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from farthing.exchange import Upstream
from farthing.upstream import ServerProcess, Watch, free_port, launch, signal_group
from farthing_fleet.signals import ColdStarts
from farthing_fleet.types import Decision


def last_lines(log: Path, lines: int = 5) -> str:
    """The last lines of a log for an error message, or an empty string."""
    try:
        text = log.read_text(errors="replace").strip().splitlines()[-lines:]
    except OSError:
        return ""
    return "; last lines: " + " | ".join(text) if text else ""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalConfig:
    """How replicas are started.

    `{port}`, `{host}` and `{name}` in the command are replaced.
    """

    command: tuple[str, ...]
    directory: Path  # logs of the replicas
    host: str = "127.0.0.1"
    health_path: str = "/health"
    ready_timeout_s: float = 600.0
    drain_timeout_s: float = 60.0
    liveness_s: float = 60.0  # a ready replica silent for this long is killed and replaced
    poll_s: float = 0.05  # between health checks of a starting replica
    failures: int = 3  # failed launches in a row before launches pause
    retry_s: float = 30.0  # first pause after giving up; doubles up to ten times that
    # A command that waits on stdin for a JSON line with the arguments after `command[:standby_skips]`. One
    # such process is kept, so that the next replica skips its imports. Empty: none is kept.
    standby: tuple[str, ...] = ()
    standby_skips: int = 0
    prefix: str = "r"  # of the replicas' names
    nodes: tuple[tuple[int, ...], ...] = ()  # CPUs of each memory node, to which replicas are bound in turn

    @property
    def watch(self) -> Watch:
        """How each replica is monitored."""
        return Watch(
            path=self.health_path,
            ready_timeout=self.ready_timeout_s,
            drain_timeout=self.drain_timeout_s,
            liveness=self.liveness_s,
            poll=self.poll_s,
        )

    def __post_init__(self) -> None:
        if not any("{port}" in part for part in self.command):
            raise ValueError(
                f"LocalConfig.command: got {' '.join(self.command)!r}; expected {{port}} somewhere in it"
            )
        for name in ("ready_timeout_s", "drain_timeout_s", "liveness_s", "poll_s", "retry_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"LocalConfig.{name}: got {getattr(self, name)}; expected seconds above 0")
        if self.failures < 1:
            raise ValueError(f"LocalConfig.failures: got {self.failures}; expected 1 or more")


@dataclass(frozen=True)
class Spare:
    """A pre-imported process that waits for its arguments."""

    name: str
    process: asyncio.subprocess.Process
    log: Path


@dataclass(eq=False)
class LocalReplica(ServerProcess):
    """One replica process."""

    log: Path = field(kw_only=True)
    node: int = field(kw_only=True, default=0)  # of `LocalConfig.nodes`
    task: asyncio.Task[None] | None = None


class LocalReplicas:
    """The actuator of local mode.

    on_change: called with {name: url} of the ready replicas when that set changes.
    """

    def __init__(
        self,
        config: LocalConfig,
        *,
        on_change: Callable[[dict[str, str]], None] = lambda ready: None,
        cold_starts: ColdStarts | None = None,
    ) -> None:
        self.config = config
        self.cold_starts = cold_starts if cold_starts is not None else ColdStarts()
        self.replicas: list[LocalReplica] = []
        self.given_up = ""  # why launches are paused; empty if they are not
        self._on_change, self._announced = on_change, dict[str, str]()
        self._wanted = 0
        self._count = 0
        self._failures = 0
        self._pause = config.retry_s
        self._retry: asyncio.TimerHandle | None = None
        self._http = Upstream(2.0, 2.0)
        self._closing = False
        self._spare: Spare | None = None
        self._starting_spare: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._reconciling = asyncio.Lock()

    # ---- Actuator ----

    async def start(self) -> None:
        self.config.directory.mkdir(parents=True, exist_ok=True)

    async def current(self) -> int:
        return self._wanted

    async def apply(self, decision: Decision) -> None:
        await self.scale(decision.target)

    async def scale(self, count: int) -> None:
        """Set the number of replicas: start missing ones, drain surplus ones (unready and youngest first)."""
        if count < 0:
            raise ValueError(f"replicas: got {count}; expected 0 or more")
        if count != self._wanted and self.given_up:
            self._forgive()
        self._wanted = count
        await self._reconcile()

    async def close(self) -> None:
        """Drain all replicas and wait until they exit."""
        self._closing = True
        self._wanted = 0
        if self._retry is not None:
            self._retry.cancel()
        for replica in self.replicas:
            self._drain(replica)
        await self._drop_spare()
        tasks = [r.task for r in self.replicas if r.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._http.close()

    # ---- state ----

    def ready(self) -> dict[str, str]:
        """{name: url} of the replicas that accept requests."""
        return {r.name: r.url for r in self.replicas if r.state == "ready"}

    async def wait_ready(self, count: int, timeout_s: float) -> bool:
        """Whether `count` replicas are ready within `timeout_s`; returns early if launches are paused."""
        deadline = time.monotonic() + timeout_s
        while len(self.ready()) < count:
            if self.given_up or (left := deadline - time.monotonic()) <= 0:
                return False
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return True

    # ---- reconciliation ----

    async def _reconcile(self) -> None:
        async with self._reconciling:
            alive = [r for r in self.replicas if r.state in ("starting", "ready")]
            surplus = sorted(alive, key=lambda r: (r.state == "ready", -r.launched))[
                : max(0, len(alive) - self._wanted)
            ]
            for replica in surplus:
                self._drain(replica)
            for _ in range(self._wanted - len(alive)):
                if self._closing or self.given_up:
                    break
                await self._launch()
        self._announce()

    async def _launch(self) -> None:
        port, launched = free_port(self.config.host), time.monotonic()
        try:
            name, log_file, process = await self._begin(port)
        except OSError as problem:
            self._failed(f"{self.config.command[0]} could not be started: {problem}")
            return
        node = self._bind(process.pid)
        url = f"http://{self.config.host}:{port}"
        replica = LocalReplica(name, url, process, launched, log=log_file, node=node)
        log.info("replica %s: pid %d, port %d", name, process.pid, port)
        self.replicas.append(replica)
        replica.task = asyncio.create_task(self._live(replica))

    def _bind(self, pid: int) -> int:
        """Bind a process that has no threads yet to the node with the fewest replicas; returns the node."""
        nodes = self.config.nodes
        if not nodes:
            return 0
        held = Counter(replica.node for replica in self.replicas)
        node = min(range(len(nodes)), key=held.__getitem__)
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(pid, nodes[node])
        return node

    async def _begin(self, port: int) -> tuple[str, Path, asyncio.subprocess.Process]:
        """Start a replica: use the spare if there is one, else a new process."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.process.returncode is None and spare.process.stdin is not None:
            words = self._filled(self.config.command[self.config.standby_skips :], spare.name, port)
            with contextlib.suppress(OSError):
                spare.process.stdin.write(json.dumps(words).encode() + b"\n")
                await spare.process.stdin.drain()
                spare.process.stdin.close()
                return spare.name, spare.log, spare.process
        name, log_file = self._new_name()
        process = await launch(self._filled(self.config.command, name, port), log_file, {})
        return name, log_file, process

    def _new_name(self) -> tuple[str, Path]:
        self._count += 1
        name = f"{self.config.prefix}{self._count}"
        return name, self.config.directory / f"{name}.log"

    def _filled(self, parts: Sequence[str], name: str, port: int) -> list[str]:
        words = {"port": str(port), "host": self.config.host, "name": name}
        return [_fill(part, words) for part in parts]

    def _keep_spare(self) -> None:
        """Ensure that a spare waits. Called when a replica is ready, so as not to slow down its start."""
        if self.config.standby and not self._closing and self._spare is None and self._starting_spare is None:
            self._starting_spare = asyncio.create_task(self._start_spare())

    async def _start_spare(self) -> None:
        name, log_file = self._new_name()
        try:
            process = await launch(self.config.standby, log_file, {}, stdin=asyncio.subprocess.PIPE)
            self._spare = Spare(name, process, log_file)
        except OSError as problem:
            log.warning("no spare process: %s", problem)
        self._starting_spare = None

    async def _drop_spare(self) -> None:
        if self._starting_spare is not None:
            await self._starting_spare
        if self._spare is not None:
            signal_group(self._spare.process, signal.SIGKILL)
            await self._spare.process.wait()
            self._spare = None

    async def _live(self, replica: LocalReplica) -> None:
        """Manage one replica from launch to exit."""
        was = await replica.live(
            self._http.status, self.config.watch, lambda took: self._ready(replica, took)
        )
        if was == "starting":
            invalid = replica.process.returncode == _INVALID and self.cold_starts.p90 is None
            self._failed(f"{replica.name}: {replica.reason}{last_lines(replica.log)}", final=invalid)
        elif was == "ready":
            log.warning("replica %s %s%s", replica.name, replica.reason, last_lines(replica.log))
        self.replicas.remove(replica)
        self._announce()
        if not self._closing and not self.given_up:
            await self._reconcile()

    def _ready(self, replica: LocalReplica, took: float) -> None:
        self.cold_starts.add(took)
        self._failures, self._pause = 0, self.config.retry_s
        log.info("replica %s is ready after %.2f s", replica.name, took)
        self._announce()
        self._keep_spare()

    def _drain(self, replica: LocalReplica) -> None:
        """Take a replica out of rotation and let its requests finish."""
        if replica.state in ("starting", "ready"):
            replica.drain(self.config.drain_timeout_s, _HANDOVER_S)
            self._announce()

    # ---- failures ----

    def _failed(self, reason: str, *, final: bool = False) -> None:
        """final: another launch would fail in the same way."""
        self._failures = self.config.failures if final else self._failures + 1
        log.error("launch failed%s: %s", "" if final else f" ({self._failures} in a row)", reason)
        if self._failures >= self.config.failures and not self._closing:
            self.given_up = reason
            log.error("launches paused for %g s or until the replica count changes", self._pause)
            self._retry = asyncio.get_running_loop().call_later(self._pause, self._try_again)
            self._pause = min(self._pause * 2, 10 * self.config.retry_s)
        self._changed.set()

    def _forgive(self) -> None:
        self.given_up, self._failures = "", 0
        if self._retry is not None:
            self._retry.cancel()

    def _try_again(self) -> None:
        self.given_up, self._failures = "", self.config.failures - 1  # allow one more failure
        self._retry_task = asyncio.ensure_future(self._reconcile())

    def _announce(self) -> None:
        ready = self.ready()
        if ready != self._announced:
            try:
                self._on_change(ready)
                self._announced = ready
            except OSError as problem:  # a full disk must not stop replica management
                log.error("cannot announce the set of replicas: %s", problem)
                asyncio.get_running_loop().call_later(1.0, self._announce)
        self._changed.set()


_INVALID = 2  # exit status for an invalid option or model: Farthing's and most programs'
_HANDOVER_S = 0.2  # time for the gateway, which reads its replicas file every 0.05 s, before SIGTERM


def _fill(text: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        text = text.replace("{" + name + "}", value)
    return text
