"""What the benchmarks share: turns, medians, the machine's ceilings, processes under test, and their output.

Programs that are compared alternate on the same machine, every second round in the reverse order; a figure is
the median of its rounds. A shared machine's bandwidth changes from second to second, so ratios of one run
compare, and seconds of two runs do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from farthing import upstream

HOST = "127.0.0.1"
CACHE = Path.home() / ".cache/farthing/bench"
FARTHING = [sys.executable, "-m", "farthing"]
log = Console(stderr=True)


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[Any]]:
    """What each returned in each of `rounds`, after `warm` rounds that do not count."""
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for turn in range(warm + rounds):
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            value = run()
            if turn >= warm:
                found[name].append(value)
    return found


def timed(calls: Sequence[Callable[[], Any]], clock: Callable[[], float], at_least: float = 0.0) -> float:
    """Seconds of one call, the mean of all of them, repeated until they take `at_least` seconds."""
    start, passes = clock(), 0
    while not passes or clock() - start < at_least:
        for call in calls:
            call()
        passes += 1
    return (clock() - start) / (passes * len(calls))


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in found.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that this share of them does not exceed; NaN of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def ceilings(threads: int) -> dict[str, float]:
    """GB/s of reads, and GOP/s of INT8 on vectors and on AMX tiles, of this machine now."""
    from farthing import _native
    from limits import vector_peak

    return {
        "threads": threads,
        "read_gb_s": _native.read_bandwidth(threads, 1 << 28),
        "int8_gop_s": vector_peak(threads),
        "amx_int8_gop_s": _native.peak_ops("amx_int8", threads),
    }


def free_port() -> int:
    """A port that is free now."""
    return upstream.free_port(HOST)


def resident(pid: int) -> int:
    """Resident bytes of a process and its descendants; a page that several map counts once."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        waiting += [child for child, parent in parents.items() if parent == one]
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            found += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@contextlib.contextmanager
def running(
    command: Sequence[object], up: Callable[[], bool], within: float = 120.0, **options: Any
) -> Iterator[Any]:
    """A process once `up()` holds; terminated at the end. Raises SystemExit if it ends before, or is late."""
    process = subprocess.Popen([str(word) for word in command], **options)
    try:
        if not holds_within(up, process, within):
            raise SystemExit(f"{' '.join(map(str, command))} did not start; status {process.returncode}")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def holds_within(up: Callable[[], bool], process: Any, seconds: float) -> bool:
    """Whether `up()` holds within so many seconds, in which the process does not end."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if up():
                return True
        time.sleep(0.02)
    return False


def answers(port: int, path: str = "/ready") -> Callable[[], bool]:
    """Whether a server answers 200 there."""

    def up() -> bool:
        with socket.create_connection((HOST, port), 5) as connection:
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            return connection.recv(64).split(b" ")[1:2] == [b"200"]

    return up


def accepts(port: int) -> Callable[[], bool]:
    """Whether something listens on a port."""

    def up() -> bool:
        socket.create_connection((HOST, port), 5).close()
        return True

    return up


def parser(about: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with --json."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print one JSON document")
    return made


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; floats have three digits."""
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*(f"{cell:,.3g}" if isinstance(cell, float) and cell < 1000 else f"{cell:,.0f}"
                        if isinstance(cell, float) else str(cell) for cell in row))  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def report(document: Any, as_json: bool, title: str, headings: Sequence[str], rows: Any) -> None:
    """Print a run as JSON or as a table."""
    if as_json:
        print(json.dumps(document))
    else:
        show(title, headings, list(rows))
