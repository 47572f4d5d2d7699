"""`farthing fleet up`: a local fleet of a gateway and the replicas of each model, scaled by its controller.

The gateway is a separate process, so that rehearsals never delay a token. Its listening socket belongs to
this process, so no connection is refused while a gateway is replaced.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from farthing import process
from farthing.upstream import launch, signal_group
from farthing_fleet.actuators.local import LocalConfig, LocalReplicas, last_lines
from farthing_fleet.config import FleetConfig, split_address
from farthing_fleet.controller import Controller
from farthing_fleet.estimates import make_estimates
from farthing_fleet.gateway.replicas_file import write_replicas
from farthing_fleet.run import make_controller, serve_metrics
from farthing_fleet.signals_scrape import ScrapeSource

PRELOAD = ("torch", "farthing.engine.engine", "farthing.server.app", "farthing.server.run", "uvicorn")


def main() -> None:
    """Wait for a line, then run it as `farthing ARGUMENTS`.

    Importing torch takes most of a small model's cold start. `python -m farthing_fleet.up` imports it, reads
    one line, a JSON list of `farthing`'s arguments, and becomes that command. It exits if stdin ends without
    a line.
    """
    for module in PRELOAD:
        importlib.import_module(module)
    line = sys.stdin.readline()
    if not line:
        return
    process.begin()
    from farthing.cli.app import main as farthing

    sys.argv = ["farthing", *json.loads(line)]
    farthing()


log = logging.getLogger(__name__)

_LATENCY_WINDOW_S = 2.0  # a mean over the whole window would detect a breach later
_GATEWAY_PAUSE_S = 0.5  # before a restart, so that a failing gateway does not spin
_YOUNG_S, _YOUNG = (
    10.0,
    3,
)  # so many gateways in a row that lived for less: another one would not serve either
_INVALID = 2  # exit status for a missing extra or an invalid option, which no restart mends


@dataclass(frozen=True)
class UpConfig:
    """Configuration of a local fleet."""

    fleet: FleetConfig
    models: Mapping[str, LocalConfig]  # how replicas are started, by the name that requests use
    host: str = "127.0.0.1"
    port: int = 8000  # 0 picks a free one
    api_key_file: Path | None = None
    start_with: int | None = None  # replicas of each; default: the policy's minimum, at least one

    def __post_init__(self) -> None:
        if unknown := set(self.fleet.models) - set(self.models):
            names = ", ".join(map(repr, self.models))
            raise ValueError(f"models: got {min(unknown)!r}; expected names of {names}")

    def fleet_of(self, number: int, model: str) -> FleetConfig:
        """The configuration of a model's controller: with several, each has its directory and port."""
        if len(self.models) == 1:
            return self.fleet
        host, port = split_address(self.fleet.metrics)
        return replace(self.fleet.of(model), metrics=f"{host}:{port + number if port else 0}")


def serve_command(model: str, extra: tuple[str, ...] = (), keys: Path | None = None) -> tuple[str, ...]:
    """The command of a replica that serves `model`.

    keys: the gateway's key file. Without it, all clients would be one tenant to the replica.
    """
    start = (sys.executable, "-m", "farthing", "serve", model)
    key_options = ("--api-key-file", str(keys)) if keys is not None else ()
    return (*start, "--host", "{host}", "--port", "{port}", *key_options, *extra)


# Standby for `serve_command`, which reads the arguments after `python -m farthing`.
STANDBY: dict[str, Any] = {"standby": (sys.executable, "-m", "farthing_fleet.up"), "standby_skips": 3}


def local_config(command: tuple[str, ...], directory: Path, *, standby: bool, **fields: Any) -> LocalConfig:
    """How replicas are started. standby: keep a process that has imported what `serve_command` needs."""
    return LocalConfig(command, directory, **fields, **(STANDBY if standby else {}))


class GatewayProcess:
    """The gateway as a child process, restarted when it dies, unless it cannot start."""

    def __init__(self, sock: socket.socket, arguments: tuple[str, ...], log_file: Path) -> None:
        self._sock, self._arguments, self._log = sock, arguments, log_file
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0
        self.failed = asyncio.Event()  # no gateway can start, for this reason:
        self.reason = ""
        self._launched, self._young = 0.0, 0
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self) -> None:
        self.process = await self._launch()
        self._task = asyncio.create_task(self._watch())

    async def _launch(self) -> asyncio.subprocess.Process:
        fd = self._sock.fileno()
        command = (
            sys.executable,
            "-m",
            "farthing.cli.app",
            "fleet",
            "gateway",
            "--fd",
            str(fd),
            *self._arguments,
        )
        self._launched = time.monotonic()
        return await launch(command, self._log, {}, pass_fds=(fd,))

    async def _watch(self) -> None:
        while not self._closing:
            process = self.process
            assert process is not None
            code = await process.wait()
            if self._closing or process is not self.process:
                continue
            self._young = self._young + 1 if time.monotonic() - self._launched < _YOUNG_S else 0
            told = f"gateway exited with {code}{last_lines(self._log)}"
            if code == _INVALID or self._young >= _YOUNG:
                self.reason = told
                self.failed.set()
                return
            log.error("%s; restarting it", told)
            await self._relaunch()

    async def _relaunch(self) -> None:
        """Start another one, once the machine has room for a process."""
        while not self._closing:
            await asyncio.sleep(_GATEWAY_PAUSE_S)
            try:
                self.process = await self._launch()
            except OSError as problem:
                log.error("gateway: cannot be started: %s; trying again", problem)
            else:
                self.restarts += 1
                return

    async def exchange(self) -> None:
        """Start a new gateway, then drain the old one: no connection is refused."""
        old, self.process = self.process, await self._launch()
        if old is not None:
            signal_group(old, signal.SIGTERM)
            await old.wait()

    async def close(self) -> None:
        """Stop accepting and let in-flight requests finish."""
        self._closing = True
        if self.process is not None:
            signal_group(self.process, signal.SIGTERM)
            await self.process.wait()
        if self._task is not None:
            self._task.cancel()


class LocalModel:
    """The replicas of one model and their controller."""

    def __init__(
        self, name: str, fleet: FleetConfig, local: LocalConfig, on_change: Callable[[dict[str, str]], None]
    ) -> None:
        self.name, self.fleet = name, fleet
        self.replicas = LocalReplicas(local, on_change=on_change)
        self.controller: Controller | None = None
        self.metrics_port = 0
        fleet.state.mkdir(parents=True, exist_ok=True)

    async def start(self, gateway: str, alone: bool, count: int | None, stack: AsyncExitStack) -> None:
        """Start replicas and controller; they stop with the stack. gateway: its URL; alone: there is no other
        model; count: of replicas.
        """
        fleet = self.fleet
        await self.replicas.start()
        stack.push_async_callback(self.replicas.close)
        await self.replicas.scale(count if count is not None else max(1, fleet.policy.min_replicas))
        source = ScrapeSource(
            self.replicas.ready,
            fleet.signals,
            fleet.policy.slo,
            latency_window_s=_LATENCY_WINDOW_S,
            gateway=gateway,
            model=None if alone else self.name,
            cold_starts=self.replicas.cold_starts,
        )
        stack.push_async_callback(source.close)
        self.controller = make_controller(fleet, source, self.replicas, make_estimates(fleet))
        self.metrics_port = await serve_metrics(fleet, self.controller, stack)

    @property
    def wake(self) -> str:
        """The URL for the gateway's reports, on this machine."""
        host, _ = split_address(self.fleet.metrics)
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
        return f"http://{host}:{self.metrics_port}/wake"

    async def wait_ready(self, timeout_s: float, tell: Callable[[str], None] = lambda text: None) -> bool:
        """Whether the first replica became ready; `tell` is called every second with the elapsed time."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if await self.replicas.wait_ready(1, 1.0):
                return True
            if self.replicas.given_up:
                return False
            tell(f"{self.name}: waiting for the first replica, {time.monotonic() - began:.0f} s")
        return False


class LocalFleet:
    """A gateway, and replicas with a controller for each model.

    An async context manager; `run` scales until stopped.
    """

    def __init__(self, config: UpConfig) -> None:
        self.config = config
        config.fleet.state.mkdir(parents=True, exist_ok=True)
        self._file = config.fleet.state / "replicas.json"
        self._ready: dict[str, dict[str, str]] = {}  # model -> {replica: url}
        self.models = [
            LocalModel(name, config.fleet_of(number, name), local, partial(self._announce, name))
            for number, (name, local) in enumerate(config.models.items())
        ]
        self._stack = AsyncExitStack()
        self.sock: socket.socket | None = None
        self.port = 0
        self.gateway: GatewayProcess | None = None

    def _announce(self, model: str, ready: dict[str, str]) -> None:
        self._ready[model] = ready
        listed = {name: url for replicas in self._ready.values() for name, url in replicas.items()}
        write_replicas(self._file, listed, self._names)

    @property
    def _names(self) -> list[str]:
        """The models' names; a single one is left to its replicas."""
        return [model.name for model in self.models] if len(self.models) > 1 else []

    @property
    def url(self) -> str:
        return f"http://{self.config.host}:{self.port}"

    async def __aenter__(self) -> LocalFleet:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        """Start socket, replicas, controllers and gateway; they stop in reverse order."""
        config = self.config
        self.sock = listen(config.host, config.port)
        self._stack.callback(self.sock.close)
        self.port = int(self.sock.getsockname()[1])
        write_replicas(self._file, {}, self._names)
        for model in self.models:
            await model.start(self.url, not self._names, config.start_with, self._stack)
        log_file = config.fleet.state / "gateway.log"
        self.gateway = GatewayProcess(self.sock, self._gateway_arguments(), log_file)
        await self.gateway.start()
        self._stack.push_async_callback(self.gateway.close)

    def _gateway_arguments(self) -> tuple[str, ...]:
        path = next(iter(self.config.models.values())).health_path
        arguments = ["--replicas-file", str(self._file), "--health-path", path]
        arguments += ["--state", str(self.config.fleet.state)]
        for model in self.models:
            arguments += ["--wake", f"{model.name}={model.wake}" if self._names else model.wake]
        if self.config.api_key_file is not None:
            arguments += ["--api-key-file", str(self.config.api_key_file)]
        return tuple(arguments)

    async def run(self, stop: asyncio.Event) -> None:
        """Scale until `stop` is set. Raises ValueError if no gateway can start."""
        assert self.gateway is not None
        controllers = [model.controller for model in self.models if model.controller is not None]
        scaling = asyncio.gather(*(controller.run(stop) for controller in controllers))
        failed = asyncio.ensure_future(self.gateway.failed.wait())
        await asyncio.wait((scaling, failed), return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            stop.set()
        failed.cancel()
        await scaling
        if self.gateway.reason:
            raise ValueError(self.gateway.reason)


def listen(host: str, port: int) -> socket.socket:
    """A bound, inheritable socket. Raises OSError with the address."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as problem:
        sock.close()
        raise OSError(problem.errno, f"cannot listen on {host}:{port}: {problem.strerror}") from problem
    sock.setblocking(False)
    sock.set_inheritable(True)
    return sock


if __name__ == "__main__":
    main()
