"""`farthing serve` that also measures how long its event loop and its engine thread were held.

    python -m bench.hostile.serve FILE ARGUMENTS…

On SIGUSR1 it writes the maxima since the last signal to FILE and resets them. A thread's CPU time does not
depend on other load; wall time is how long other clients waited.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from farthing.cli.app import main
from farthing.engine.core import EngineCore
from farthing.server.run import Server

_BEAT = 0.001  # seconds


class Holds:
    """The longest time for which each thread was held, in seconds."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._most: dict[str, float] = {}

    def note(self, name: str, seconds: float) -> None:
        """Record that a thread was held for `seconds`."""
        self._most[name] = max(self._most.get(name, 0.0), seconds)

    def write(self, *_: object) -> None:
        """Write and reset the maxima."""
        whole, self._most = self._most, {}
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(whole))
        new.replace(self._file)


def watch_loop(holds: Holds) -> None:
    """Record CPU and wall time between two iterations of the running event loop."""
    loop = asyncio.get_running_loop()
    cpu, wall = time.thread_time(), time.monotonic()

    def beat() -> None:
        nonlocal cpu, wall
        holds.note("loop cpu", time.thread_time() - cpu)
        holds.note("loop wall", time.monotonic() - wall - _BEAT)
        cpu, wall = time.thread_time(), time.monotonic()
        loop.call_later(_BEAT, beat)

    beat()


def timed(step: Callable[[EngineCore], bool], holds: Holds) -> Callable[[EngineCore], bool]:
    """`EngineCore.step` with timing."""

    def run(core: EngineCore) -> bool:
        cpu, wall = time.thread_time(), time.monotonic()
        done = step(core)
        holds.note("step cpu", time.thread_time() - cpu)
        holds.note("step wall", time.monotonic() - wall)
        return done

    return run


def install(file: Path) -> None:
    """Start measuring this process."""
    holds = Holds(file)
    signal.signal(signal.SIGUSR1, holds.write)
    EngineCore.step = timed(EngineCore.step, holds)  # type: ignore[method-assign]
    serve = Server.serve

    async def watched(self: Server, *arguments: Any, **options: Any) -> None:
        watch_loop(holds)
        await serve(self, *arguments, **options)

    Server.serve = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    sys.argv[1:] = sys.argv[2:]
    main()
