"""Start and stop `farthing` server processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_TIMEOUT = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    url: str
    pid: int
    seconds_to_ready: float  # from the start of the process

    def get(self, path: str) -> str:
        """Body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def metric(self, name: str) -> float:
        """Sum of a metric's samples on /metrics; 0 if absent."""
        rows = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, rows))

    def peak_memory(self) -> int:
        """Peak resident set size so far, bytes."""
        return int(_status(self.pid, "VmHWM")) * 1024

    def cpu_seconds(self) -> float:
        """Processor time so far, user and system, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that is currently free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serve(model: str, options: Sequence[str] = ()) -> Iterator[Served]:
    """Start `farthing serve MODEL OPTIONS` on a free port, wait until it is ready, and stop it on exit.

    Raises RuntimeError with the server's last log lines if it does not become ready.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", model, "--port", str(port), *options]
    start = time.perf_counter()
    with running(arguments, url, READY_TIMEOUT, signal.SIGTERM, 15) as process:
        yield Served(url, process.pid, time.perf_counter() - start)


@contextmanager
def running(
    arguments: list[str], url: str, ready_timeout: float, stop: signal.Signals, stop_timeout: float
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `farthing ARGUMENTS` in a process and wait until `url` is ready. On exit, send the signal `stop`
    and kill the process after stop_timeout seconds.

    Raises RuntimeError with its last log lines if it is not ready within ready_timeout seconds.
    """
    command = [sys.executable, "-m", "farthing.cli.app", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        deadline = time.perf_counter() + ready_timeout
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not ready(url):
                if process.poll() is not None or time.perf_counter() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"`{' '.join(command)}` did not become ready:\n{log.read()[-2000:]}")
                time.sleep(0.02)
            yield process
        finally:
            process.send_signal(stop)
            try:
                process.wait(stop_timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ready(url: str) -> bool:
    """Whether a server accepts requests."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _status(pid: int, field: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return line.split()[1]
    raise RuntimeError(f"/proc/{pid}/status has no {field}")
