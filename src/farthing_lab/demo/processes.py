"""Processes of `farthing`, waited for as long as they get on, however slow the machine is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

QUIET = 60.0  # seconds without a line
STUCK = 180.0  # seconds in which a process that works does something, at a load of fifteen too
Say = Callable[[str], None]


class Watch:
    """Says once a minute that a process still works, and raises RuntimeError once it does not."""

    def __init__(self, name: str, pid: int, say: Say) -> None:
        self._name, self._pid, self._say = name, pid, say
        self._began = self._said = self._moved = time.monotonic()
        self._work = 0.0

    def look(self) -> None:
        """To be called often."""
        now, work = time.monotonic(), _work(self._pid)
        if work >= self._work + 1 or work < self._work:  # less: one of its children has ended
            self._work, self._moved = work, now
        if now - self._moved > STUCK:
            raise RuntimeError(f"{self._name} has done nothing for {STUCK:.0f} s")
        if now - self._said > QUIET:
            self._said = now
            self._say(f"{self._name}: {now - self._began:.0f} s, still working")


def _work(root: int) -> float:
    """Processor seconds of a process and of all that it started, and the megabytes that they have written;
    the time where the system does not say."""
    total, family = 0.0, {root}
    for pid in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with suppress(OSError):  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if pid == root or int(fields[1]) in family:
                family.add(pid)
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                total += int(Path(f"/proc/{pid}/io").read_text().split()[3]) / 1e6
    return total if Path("/proc/self").exists() else time.monotonic()


def cli(say: Say, *arguments: str) -> str:
    """Run a `farthing` command and return its output; its progress goes to the terminal.

    Raises RuntimeError if it fails, or does nothing any more.
    """
    with tempfile.TemporaryFile("w+") as out, _started(arguments, out) as process:
        watch = Watch(_name(arguments), process.pid, say)
        while process.poll() is None:
            watch.look()
            time.sleep(0.1)
        if process.returncode:
            raise RuntimeError(f"{_name(arguments)} ended with exit code {process.returncode}")
        out.seek(0)
        return out.read()


@contextmanager
def running(
    arguments: list[str], url: str, say: Say, stop: signal.Signals
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `farthing ARGUMENTS` and wait until `url` is ready. On exit, send the signal `stop`.

    Raises RuntimeError with its last log lines if it ends, or does nothing any more, before it is ready.
    """
    with tempfile.TemporaryFile("w+") as log, _started(arguments, log, subprocess.STDOUT) as process:
        watch = Watch(_name(arguments), process.pid, say)
        while not _ready(url):
            if process.poll() is not None:
                log.seek(0)
                raise RuntimeError(f"{_name(arguments)} did not become ready:\n{log.read()[-2000:]}")
            watch.look()
            time.sleep(0.05)
        try:
            yield process
        finally:
            process.send_signal(stop)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STUCK)


@contextmanager
def _started(
    arguments: tuple[str, ...] | list[str], out: IO[str], errors: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "farthing.cli.app", *arguments], stdout=out, stderr=errors
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _name(arguments: tuple[str, ...] | list[str]) -> str:
    return f"`farthing {' '.join(arguments[:2])}`"


def fetch(url: str) -> str:
    """Body of a GET request."""
    with urllib.request.urlopen(url, timeout=STUCK) as response:
        return str(response.read().decode())


def _ready(url: str) -> bool:
    try:
        fetch(f"{url}/ready")
    except (urllib.error.URLError, OSError):
        return False
    return True
