"""Short work in threads of the engine's process, in the same fair order as the work of child processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from farthing.engine.sandbox.turns import Turns

T = TypeVar("T")
_THREADS = 3  # a client holds one, so two are left whatever one client sends


@dataclass(slots=True, eq=False)
class _Call:
    run: Callable[[], Any]
    size: int = 0
    future: Future[Any] = field(default_factory=Future)


class Local:
    """A fair queue and the threads that serve it; they start with the first call."""

    def __init__(self) -> None:
        unlimited = float("inf")
        self.turns: Turns[_Call] = Turns(_THREADS, 1, unlimited, 0.0, max_waiting=4096)
        self._lock = threading.Lock()
        self._started = False

    def submit(self, run: Callable[[], T], client: str = "") -> Future[T]:
        """Queue a call. Raises Busy. The future raises what the call raises."""
        call = _Call(run)
        self.turns.put(client, call)
        with self._lock:
            start, self._started = not self._started, True
        if start:
            for _ in range(_THREADS):
                threading.Thread(target=self._serve, name="farthing-local", daemon=True).start()
        return call.future

    def close(self) -> None:
        """End the threads; calls that wait are cancelled."""
        for call in self.turns.close():
            call.future.cancel()

    def _serve(self) -> None:
        while (turn := self.turns.take()) is not None:
            client, call, _ = turn
            began = time.thread_time()
            error: BaseException | None = None
            result = None
            if not call.future.set_running_or_notify_cancel():
                self.turns.done(client, 0.0)
                continue
            try:
                result = call.run()
            except BaseException as raised:  # the caller's
                error = raised
            seconds = time.thread_time() - began
            self.turns.done(client, seconds)
            if error is not None:
                call.future.set_exception(error)
            else:
                call.future.set_result(result)
