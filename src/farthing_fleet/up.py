"""`farthing fleet up`: a local fleet of a gateway and replicas, scaled by the controller.

The gateway is a separate process, so that forecasters never delay a token. Its listening socket belongs to
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
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing import process
from farthing.upstream import launch, signal_group
from farthing_fleet.actuators.local import LocalConfig, LocalReplicas, last_lines
from farthing_fleet.config import FleetConfig, split_address
from farthing_fleet.controller import Controller, Estimates
from farthing_fleet.estimates import make_estimates
from farthing_fleet.gateway.replicas_file import write_replicas
from farthing_fleet.run import make_controller, serve_metrics
from farthing_fleet.signals import dialect
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


@dataclass(frozen=True)
class UpConfig:
    """Configuration of a local fleet."""

    fleet: FleetConfig
    local: LocalConfig
    host: str = "127.0.0.1"
    port: int = 8000  # 0 picks a free one
    api_key_file: Path | None = None
    start_with: int | None = None  # replicas; default: the policy's minimum, at least one


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
    """The gateway as a child process, restarted when it dies."""

    def __init__(self, sock: socket.socket, arguments: tuple[str, ...], log_file: Path) -> None:
        self._sock, self._arguments, self._log = sock, arguments, log_file
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0
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
        return await launch(command, self._log, {}, pass_fds=(fd,))

    async def _watch(self) -> None:
        while not self._closing:
            process = self.process
            assert process is not None
            code = await process.wait()
            if self._closing or process is not self.process:
                continue
            log.error("gateway exited with %d%s; restarting it", code, last_lines(self._log))
            await asyncio.sleep(_GATEWAY_PAUSE_S)
            self.restarts += 1
            self.process = await self._launch()

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


class LocalFleet:
    """Gateway, replicas and controller.

    An async context manager; `run` scales until stopped.
    """

    def __init__(self, config: UpConfig, estimates: Estimates | None = None) -> None:
        self.config = config
        state = config.fleet.state
        state.mkdir(parents=True, exist_ok=True)
        self._file = state / "replicas.json"
        self.replicas = LocalReplicas(config.local, on_change=lambda ready: write_replicas(self._file, ready))
        self._estimates = estimates
        self._stack = AsyncExitStack()
        self.sock: socket.socket | None = None
        self.port = 0
        self.metrics_port = 0
        self.gateway: GatewayProcess | None = None
        self.controller: Controller | None = None

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
        """Start socket, replicas, gateway and controller; they stop in reverse order."""
        config, fleet = self.config, self.config.fleet
        self.sock = listen(config.host, config.port)
        self._stack.callback(self.sock.close)
        self.port = int(self.sock.getsockname()[1])
        write_replicas(self._file, {})
        await self.replicas.start()
        self._stack.push_async_callback(self.replicas.close)
        count = config.start_with if config.start_with is not None else max(1, fleet.policy.min_replicas)
        await self.replicas.scale(count)
        source = ScrapeSource(
            self.replicas.targets,
            dialect=dialect(fleet.signals.metrics),
            window_s=fleet.signals.window_s,
            latency_window_s=_LATENCY_WINDOW_S,
            timeout_s=fleet.signals.timeout_s,
            ttft_s=fleet.policy.slo.ttft_s,
            tpot_s=fleet.policy.slo.tpot_s,
            gateway=self.url,
            cold_starts=self.replicas.cold_starts,
        )
        self._stack.push_async_callback(source.close)
        self.controller = make_controller(fleet, source, self.replicas, self._estimates)
        self.metrics_port = await serve_metrics(fleet, self.controller, self._stack)
        self.gateway = GatewayProcess(self.sock, self._gateway_arguments(), fleet.state / "gateway.log")
        await self.gateway.start()
        self._stack.push_async_callback(self.gateway.close)

    def _gateway_arguments(self) -> tuple[str, ...]:
        arguments = ["--replicas-file", str(self._file), "--health-path", self.config.local.health_path]
        arguments += ["--state", str(self.config.fleet.state)]
        arguments += ["--wake", f"http://{self._metrics_host}:{self.metrics_port}/wake"]
        if self.config.api_key_file is not None:
            arguments += ["--api-key-file", str(self.config.api_key_file)]
        return tuple(arguments)

    @property
    def _metrics_host(self) -> str:
        """Host at which this machine reaches the controller's metrics server."""
        host, _ = split_address(self.config.fleet.metrics)
        return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)

    async def run(self, stop: asyncio.Event) -> None:
        """Scale until `stop` is set."""
        assert self.controller is not None
        await self.controller.run(stop)

    async def wait_ready(self, timeout_s: float, tell: Callable[[str], None] = lambda text: None) -> bool:
        """Whether the first replica became ready; `tell` is called every second with the elapsed time."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if await self.replicas.wait_ready(1, 1.0):
                return True
            if self.replicas.given_up:
                return False
            tell(f"waiting for the first replica, {time.monotonic() - began:.0f} s")
        return False


async def load_estimates(fleet: LocalFleet) -> None:
    """Load the forecasters of a running fleet; their imports take seconds, during which replicas start.

    Raises ValueError if the `forecast` section of the configuration is invalid.
    """

    def make() -> Estimates:

        return make_estimates(fleet.config.fleet)

    assert fleet.controller is not None
    fleet.controller.estimates = await asyncio.to_thread(make)


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
