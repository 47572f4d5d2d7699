"""Child processes that run jobs one at a time, each under a deadline; clients take turns.

A lane is a queue with its own children, so that a client's heavy jobs never delay light ones. A child that
misses a deadline, dies or grows too large is replaced. Children start with the first job, or with `warm`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from farthing.engine.sandbox import frames

_START_SECONDS = 120.0  # for a child to start and load its tokenizer
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")

Setup = Callable[[], Mapping[str, Any]]  # what every child receives first


class Busy(RuntimeError):
    """A client already has as many jobs waiting as one may have; retry later (HTTP 429)."""


class Lost(ValueError):
    """The child missed the deadline or died: the input is at fault, as far as anyone can tell."""


@dataclass(slots=True, eq=False)
class Job:
    """One call: the name of a job, its arguments, and the seconds it may take."""

    name: str
    arguments: Mapping[str, Any]
    seconds: float
    future: Future[Any] = field(default_factory=Future)


class Lane:
    """A queue of jobs and the children that run them.

    `niceness` is added to the children's, so that heavy work yields to the engine's threads.
    """

    def __init__(self, setup: Setup, children: int = 1, niceness: int = 0, max_waiting: int = 256) -> None:
        self._setup = setup
        self._niceness = niceness
        self._max_waiting = max_waiting  # jobs of one client
        self._free = children  # threads that may still be started
        self._idle = 0
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()  # by client; the first is next
        self._changed = threading.Condition()
        self._closed = False
        self._children: set[Child] = set()

    def submit(self, job: Job, client: str = "") -> Future[Any]:
        """Queue a job. Raises Busy. The future raises ValueError where the input is refused or lost."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            queue = self._queues.setdefault(client, deque())
            if len(queue) >= self._max_waiting:
                raise Busy(f"{len(queue)} inputs of this client are waiting to be checked; retry later")
            queue.append(job)
            self._start_thread()
            self._changed.notify()
        return job.future

    def warm(self) -> None:
        """Start one child now."""
        with self._changed:
            if not self._closed and not self._children:
                self._start_thread()

    def close(self) -> None:
        """Kill the children; jobs that wait or run fail."""
        with self._changed:
            self._closed = True
            waiting = [job for queue in self._queues.values() for job in queue]
            self._queues.clear()
            children = list(self._children)
            self._changed.notify_all()
        for child in children:
            child.kill()
        for job in waiting:
            job.future.cancel()

    def _start_thread(self) -> None:
        if self._free and not self._idle:
            self._free -= 1
            threading.Thread(target=self._work, name="farthing-sandbox", daemon=True).start()

    def _work(self) -> None:
        child: Child | None = None
        while True:
            if child is None:
                child = self._new_child()
            job = self._next()
            if job is None:
                break
            if not job.future.set_running_or_notify_cancel():
                continue
            if child is None:
                job.future.set_exception(RuntimeError("the sandbox could not start a process; retry later"))
                continue
            try:
                result, keep = child.run(job)
            except Exception as error:
                keep = isinstance(error, Refused)
                job.future.set_exception(error)
            else:
                job.future.set_result(result)
            if not keep:
                self._discard(child)
                child = None
        if child is not None:
            self._discard(child)

    def _next(self) -> Job | None:
        with self._changed:
            self._idle += 1
            while not self._queues and not self._closed:
                self._changed.wait()
            self._idle -= 1
            if self._closed:
                return None
            client, queue = self._queues.popitem(last=False)
            job = queue.popleft()
            if queue:
                self._queues[client] = queue  # at the back: clients take turns
                self._changed.notify()
            return job

    def _new_child(self) -> Child | None:
        try:
            child = Child(self._setup(), self._niceness)
        except (OSError, EOFError, ValueError):
            return None
        with self._changed:
            self._children.add(child)
            if self._closed:
                child.kill()
        return child

    def _discard(self, child: Child) -> None:
        child.kill()
        with self._changed:
            self._children.discard(child)


class Refused(ValueError):
    """The job's own verdict on its input."""


class Child:
    """One process. Raises OSError, EOFError or ValueError where it does not start."""

    def __init__(self, setup: Mapping[str, Any], niceness: int) -> None:
        self._connection, theirs = socket.socketpair()
        environment = os.environ | dict.fromkeys(_ONE_THREAD, "1") | {"TOKENIZERS_PARALLELISM": "false"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "farthing.engine.sandbox.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        try:
            deadline = time.monotonic() + _START_SECONDS
            frames.send(self._connection, {"niceness": niceness, **setup}, deadline)
            frames.receive(self._connection, deadline)
        except BaseException:
            self.kill()
            raise

    def run(self, job: Job) -> tuple[Any, bool]:
        """(result, whether the child can take another job). Raises Refused, or Lost."""
        deadline = time.monotonic() + job.seconds
        try:
            frames.send(self._connection, [job.name, job.arguments, job.seconds], deadline)
            answer = frames.receive(self._connection, deadline)
        except TimeoutError:
            raise Lost(f"took longer than {job.seconds:g} s to check") from None
        except (OSError, EOFError, ValueError):
            raise Lost("could not be checked: it exhausted memory, time or the stack") from None
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer["result"], not answer["retire"]

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._connection.close()
        self._process.wait()
