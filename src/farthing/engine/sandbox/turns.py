"""Whose job runs next: clients take turns, and the CPU time that they used counts.

A client holds few places at once, and the last free place is kept for one that holds none, so one client's
slow jobs never delay another's. CPU time is charged to a credit that refills slowly; a client without credit
holds one place at the lowest priority.

CPU time of abandoned jobs is also a debt. Beyond the credit, none of the client's jobs begin
until it is refilled, at the same rate. Otherwise a client could keep every core busy with work whose results
it never collects.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from farthing.shares import Busy, Shares


class Sized(Protocol):
    """A job, as far as its place in the queue matters."""

    @property
    def size(self) -> int:
        """Bytes it holds while it waits, about."""


T = TypeVar("T", bound=Sized)


class WorkQueue(Generic[T]):
    """A queue per client. Thread-safe."""

    def __init__(
        self,
        places: int,
        places_each: int,
        credit: float,
        refill: float,
        max_waiting: int = 256,
        max_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """places: jobs at once; places_each: of one client with credit. credit: CPU seconds that a client
        may use before it is put last; refill: of them per second. max_waiting, max_bytes: jobs of one client,
        and what they hold."""
        self._free = places
        self._each = places_each
        self._max_waiting, self._max_bytes = max_waiting, max_bytes
        self._waiting: dict[str, deque[T]] = {}  # clients without any are absent
        self._running: Counter[str] = Counter()
        self._work = Shares(credit, refill, clock=clock)  # CPU seconds
        self._debts = Shares(credit, refill, clock=clock)  # CPU seconds of abandoned jobs
        self._bytes = Shares(max_bytes)  # of the waiting jobs
        self._seconds: defaultdict[str, float] = defaultdict(float)  # in all
        self._changed = threading.Condition()
        self._closed = False

    def put(self, client: str, job: T) -> None:
        """Queue a job. Raises Busy."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            queue, room = self._waiting.get(client, ()), self._bytes.room(client)
            if len(queue) >= self._max_waiting or (queue and job.size > room):
                raise Busy(
                    f"{len(queue)} inputs of this key ({self._max_bytes - room:.0f} bytes) wait to be "
                    f"checked; expected at most {self._max_waiting} ({self._max_bytes} bytes); retry later"
                )
            self._waiting.setdefault(client, deque()).append(job)
            self._bytes.charge(client, job.size)
            self._work.enter(client)
            self._changed.notify()

    def take(self) -> tuple[str, T, bool] | None:
        """(client, its next job, whether the client has credit); waits for one. None once closed.

        `done` gives the place back.
        """
        with self._changed:
            while not self._closed:
                client = self._choose()
                if client is not None:
                    queue = self._waiting[client]
                    job = queue.popleft()
                    if not queue:
                        del self._waiting[client]
                    self._bytes.charge(client, -job.size)
                    self._running[client] += 1
                    self._free -= 1
                    return client, job, self._work.room(client) > 0
                self._changed.wait(self._next_paid())
            return None

    def done(self, client: str, seconds: float, abandoned: bool = False) -> None:
        """A job has ended after this much CPU time. abandoned: its client had left."""
        with self._changed:
            self._free += 1
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
            self._work.charge(client, seconds)
            self._work.leave(client)
            if seconds:
                self._seconds[client] += seconds
            if abandoned:
                self._debts.charge(client, seconds)
            self._changed.notify_all()  # for some of the waiting threads no job may be eligible yet

    def seconds(self) -> dict[str, float]:
        """CPU time used so far, by client."""
        with self._changed:
            return dict(self._seconds)

    def seconds_of(self, client: str) -> float:
        """CPU time that one client has used so far."""
        with self._changed:
            return self._seconds.get(client, 0.0)

    def close(self) -> list[T]:
        """End `take` everywhere; returns the jobs that wait."""
        with self._changed:
            self._closed = True
            jobs = [job for queue in self._waiting.values() for job in queue]
            self._waiting.clear()
            self._changed.notify_all()
            return jobs

    def _choose(self) -> str | None:
        """The next client: first those that hold no place and have credit."""
        ranks: dict[tuple[bool, bool], list[str]] = {}
        for client in self._waiting if self._free else ():
            spent, running = self._work.room(client) <= 0, self._running[client]
            full = running and (self._free == 1 or spent or running >= self._each)
            if not full and self._debts.room(client) >= 0:
                ranks.setdefault((spent, running > 0), []).append(client)
        return self._work.next(ranks[min(ranks)]) if ranks else None

    def _next_paid(self) -> float | None:
        """Seconds until the debt of a waiting client no longer holds it back; None if there is none."""
        waits = [wait for client in self._waiting if 0 < (wait := self._debts.wait(client)) < math.inf]
        return min(waits) + 0.01 if waits and self._free else None
