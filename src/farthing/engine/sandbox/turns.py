"""Whose job runs next: clients take turns, and what they used counts.

A client holds few places at once, and the last free place is kept for one that holds none, so one client's
slow jobs never delay another's. CPU time is charged to a credit that refills slowly; a client without credit
holds one place at the lowest priority.

CPU time of abandoned jobs is also a debt. Beyond the credit, none of the client's jobs begin
until it is refilled, at the same rate. Otherwise a client could keep every core busy with work whose results
it never collects.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Busy(RuntimeError):
    """A client has as many jobs waiting as one may have; retry later (HTTP 429)."""


class Sized(Protocol):
    """A job, as far as its place in the queue matters."""

    @property
    def size(self) -> int:
        """Bytes it holds while it waits, about."""


T = TypeVar("T", bound=Sized)


@dataclass(slots=True)
class _Client(Generic[T]):
    credit: float  # CPU seconds
    refilled_at: float
    waiting: deque[T] = field(default_factory=deque)
    bytes: int = 0  # of the waiting jobs
    running: int = 0
    debt: float = 0.0  # CPU seconds of abandoned jobs, not yet refilled


class Turns(Generic[T]):
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
        self._credit, self._refill = credit, refill
        self._max_waiting, self._max_bytes = max_waiting, max_bytes
        self._clock = clock
        self._clients: OrderedDict[str, _Client[T]] = OrderedDict()  # the first has waited longest for a turn
        self._seconds: defaultdict[str, float] = defaultdict(float)  # outlive a client's entry
        self._changed = threading.Condition()
        self._closed = False

    def put(self, client: str, job: T) -> None:
        """Queue a job. Raises Busy."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            known = self._clients.get(client)
            if known is None:
                self._forget()
                known = self._clients[client] = _Client(self._credit, self._clock())
            if len(known.waiting) >= self._max_waiting or (
                known.waiting and known.bytes + job.size > self._max_bytes
            ):
                raise Busy(
                    f"{len(known.waiting)} inputs of this key ({known.bytes} bytes) wait to be checked; "
                    f"expected at most {self._max_waiting} ({self._max_bytes} bytes); retry later"
                )
            known.waiting.append(job)
            known.bytes += job.size
            self._changed.notify()

    def take(self) -> tuple[str, T, bool] | None:
        """(client, its next job, whether the client has credit); waits for one. None once closed.

        `done` gives the place back.
        """
        with self._changed:
            while not self._closed:
                chosen = self._choose()
                if chosen is not None:
                    name, client = chosen
                    job = client.waiting.popleft()
                    client.bytes -= job.size
                    client.running += 1
                    self._free -= 1
                    self._clients.move_to_end(name)
                    return name, job, client.credit > 0
                self._changed.wait(self._next_paid())
            return None

    def done(self, client: str, seconds: float, abandoned: bool = False) -> None:
        """A job has ended after this much CPU time. abandoned: its client had left."""
        with self._changed:
            self._free += 1
            if seconds:
                self._seconds[client] += seconds
            if (known := self._clients.get(client)) is not None:  # not closed
                known.credit -= seconds
                known.running -= 1
                if abandoned:
                    self._refresh(known)
                    known.debt += seconds
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
            jobs = [job for client in self._clients.values() for job in client.waiting]
            self._clients.clear()
            self._changed.notify_all()
            return jobs

    def _choose(self) -> tuple[str, _Client[T]] | None:
        """The next client: first those that hold no place and have credit, in turn."""
        best: tuple[tuple[bool, bool], str, _Client[T]] | None = None
        if not self._free:
            return None
        for name, client in self._clients.items():
            if not client.waiting:
                continue
            self._refresh(client)
            if client.debt > self._credit:
                continue
            spent, holding = client.credit <= 0, client.running > 0
            if holding and (self._free == 1 or spent or client.running >= self._each):
                continue
            if best is None or (spent, holding) < best[0]:
                best = (spent, holding), name, client
        return None if best is None else best[1:]

    def _refresh(self, client: _Client[T]) -> None:
        now = self._clock()
        refilled = (now - client.refilled_at) * self._refill
        client.credit = min(self._credit, client.credit + refilled)
        client.debt = max(0.0, client.debt - refilled)
        client.refilled_at = now

    def _next_paid(self) -> float | None:
        """Seconds until the debt of a waiting client no longer holds it back; None if there is none."""
        owed = [each.debt - self._credit for each in self._clients.values() if each.waiting]
        owed = [seconds for seconds in owed if seconds > 0]
        return min(owed) / self._refill + 0.01 if owed and self._refill and self._free else None

    def _forget(self) -> None:
        """Drop clients that are as good as new."""
        for name, client in list(self._clients.items()):
            if not client.waiting and not client.running:
                self._refresh(client)
                if client.credit >= self._credit and not client.debt:
                    del self._clients[name]
