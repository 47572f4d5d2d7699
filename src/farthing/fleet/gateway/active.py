"""An interruptible request in flight on a replica."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Why = Literal["stopping", "hung"]


class Interrupted(Exception):
    """The exchange was interrupted: the gateway stops or the replica hangs."""

    def __init__(self, why: Why) -> None:
        super().__init__(
            "the gateway is shutting down" if why == "stopping" else "the replica stopped answering"
        )
        self.why = why


@dataclass(eq=False)
class Active:
    """One exchange with one replica."""

    streamed: bool
    began: float  # loop time
    heard: bool = False  # the replica has sent a byte
    queued: int = 0  # bytes of prompt text to compute before the first byte
    alone: bool = True  # no other request was ever in flight on the replica meanwhile
    _task: asyncio.Task[object] | None = None
    _why: Why | None = None

    def interrupt(self, why: Why) -> None:
        """Raise Interrupted inside `interruptible`; no effect outside it."""
        if self._task is not None and self._why is None:
            self._why = why
            self._task.cancel()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A region in which `interrupt` raises Interrupted in the task that entered it."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        try:
            yield
        except asyncio.CancelledError:
            why, self._why = self._why, None
            if why is None:
                raise
            task.uncancel()
            raise Interrupted(why) from None
        finally:
            self._task = None
