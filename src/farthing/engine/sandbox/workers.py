"""The engine's side of the sandbox: a pool of forked workers, of which none can take another down."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from farthing.engine.sandbox import child
from farthing.engine.sandbox.turns import WorkQueue

_START_SECONDS = 120.0  # for the server to start and load its tokenizer
_ANSWER_SECONDS = 20.0  # for the server to fork or end a worker
_WALL_SECONDS = 60.0  # for one job; its CPU limit comes first unless the machine is overloaded
_SLICE_SECONDS = 0.1  # a job that takes longer is slow, and yields to the engine and to quick jobs
_SLOW, _SPENT = 5, 10  # added niceness of a slow job, and of any job of a client without credit
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(slots=True, eq=False)
class Work:
    """One call: the name of a job, what makes its arguments, of about `size` bytes, what errors call its
    input, and the CPU seconds and bytes of memory it may take. Arguments are made in the thread that sends
    them, because those of a long conversation would hold the event loop."""

    name: str
    arguments: Callable[[], Mapping[str, Any]]
    what: str
    seconds: float
    memory: int
    size: int = 0
    future: Future[Any] = field(default_factory=Future)
    abandoned: bool = False  # its client has left
    pid: int | None = None  # of the process that runs it

    def abandon(self) -> None:
        """Let it run on only while the cores are idle. It is not ended, as a client that tries again after a
        timeout of its own would never get its verdict."""
        self.abandoned = True
        if (pid := self.pid) is not None:
            _only_idle(pid)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: its result, or the error to raise; its CPU seconds; and whether the worker can
    take another job."""

    result: Any = None
    error: Exception | None = None
    seconds: float = 0.0
    reusable: bool = False


class Killed(RuntimeError):
    """The worker was ended from outside, so the job may be innocent."""


class ForkServer:
    """The process that forks workers. Raises OSError, EOFError or ValueError where it does not start."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
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
            child.send(self._control, setup, deadline)
            if (answer := child.receive(self._control, deadline)) != child.READY:
                raise ValueError(answer)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def spawn(self) -> Worker:
        """A new worker. Raises OSError, EOFError or ValueError where the server has died."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                return Worker(self, self._ask("fork", theirs.fileno()), ours)
        except BaseException:
            ours.close()
            raise

    def end(self, pid: int) -> tuple[int, float]:
        """Kill a worker that `spawn` made: (the signal that ended it or 0, its CPU seconds)."""
        ended, seconds = self._ask(pid)
        return int(ended), float(seconds)

    def _ask(self, request: Any, descriptor: int | None = None) -> Any:
        deadline = time.monotonic() + _ANSWER_SECONDS
        with self._lock:
            try:
                child.send(self._control, request, deadline, descriptor)
                return child.receive(self._control, deadline)
            except BaseException:  # a late answer must not be read as that of the next request
                with contextlib.suppress(OSError):
                    self._control.shutdown(socket.SHUT_RDWR)
                raise

    def close(self) -> None:
        """End the server and all of its workers."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # it ends its workers and leaves
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        self._process.kill()
        self._process.wait()
        self._control.close()


class Worker:
    """One process that runs one job at a time."""

    def __init__(self, server: ForkServer, pid: int, connection: socket.socket) -> None:
        self.server, self.pid = server, pid
        self._connection = connection
        self._seconds = 0.0  # CPU time of earlier jobs

    def run(self, job: Work, spent: bool) -> Outcome:
        """Run a job; a slow one, or one of a client without credit (`spent`), at a lower priority.

        A worker runs either kind and not both. Unless the outcome is reusable, it has ended. Raises Killed.
        """
        deadline = time.monotonic() + _WALL_SECONDS
        job.pid = self.pid
        try:
            if spent:
                self._yield(_SPENT)
            child.send(self._connection, [job.name, job.arguments(), job.seconds, job.memory], deadline)
            slow = not self._answers_within(_SLICE_SECONDS)
            if slow and not spent:
                self._yield(_SLOW)
            answer = child.receive(self._connection, deadline)
        except (OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
            return self._failed(job, isinstance(error, TimeoutError))
        finally:
            job.pid = None
        self._seconds += answer["seconds"]
        # A priority cannot be raised again.
        reusable = not (answer["retire"] or job.abandoned) and (spent or not slow)
        if not reusable:
            with contextlib.suppress(OSError, EOFError, ValueError):
                self.end()
        refusal = None
        if "refused" in answer:
            refusal = ValueError(answer["refused"])
        elif "failed" in answer:
            refusal = ValueError(f"{job.what} is not accepted: {answer['failed']}")
        return Outcome(answer.get("result"), refusal, answer["seconds"], reusable)

    def end(self) -> tuple[int, float]:
        """Kill it: see `ForkServer.end`."""
        self._connection.close()
        return self.server.end(self.pid)

    def _failed(self, job: Work, late: bool) -> Outcome:
        """The outcome of a job without an answer. Raises Killed."""
        try:
            ended, total = self.end()
        except (OSError, EOFError, ValueError):
            raise Killed("the process that checks inputs was killed; retry later") from None
        seconds = max(0.0, total - self._seconds)
        if late:
            error: Exception = RuntimeError(
                f"{job.what} was not checked in {_WALL_SECONDS:g} s, as the server is overloaded; retry later"
            )
        elif ended == signal.SIGKILL:
            raise Killed("the process that checks inputs was killed; retry later")
        elif ended == signal.SIGXCPU:
            error = ValueError(
                f"{job.what} takes more than {job.seconds:g} s of CPU time to check; expected a simpler one"
            )
        else:
            error = ValueError(
                f"{job.what} takes more stack to check than one input may have; expected a simpler one"
            )
        return Outcome(error=error, seconds=seconds)

    def _answers_within(self, seconds: float) -> bool:
        poll = select.poll()  # unlike select(), for any number of open files
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def _yield(self, niceness: int) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)


def _only_idle(pid: int) -> None:
    """Run a worker, which may just have ended, on cores that are idle otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # SCHED_IDLE is Linux's
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


# Runs jobs in forked workers, several at once; a job that ends its worker costs no other job anything.

log = logging.getLogger(__name__)

_CORES = os.cpu_count() or 1
_PLACES = max(4, _CORES // 2)
_PLACES_EACH = max(2, _CORES // 4)
_CREDIT_SECONDS = max(2.0, _CORES / 4)  # CPU time of one client at full priority
_REFILL = _CORES / 8  # of it per second

Setup = Callable[[], Mapping[str, Any]]  # what the fork server receives first


class Pool:
    """A fair queue and the workers that serve it. Processes start with the first job, or with `warm`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.turns: WorkQueue[Work] = WorkQueue(_PLACES, _PLACES_EACH, _CREDIT_SECONDS, _REFILL)
        self._idle: dict[bool, list[Worker]] = {
            False: [],
            True: [],
        }  # by whether they run spent clients' jobs
        self._starting = threading.Lock()  # of the fork server
        self._server: ForkServer | None = None
        self._trouble = ""  # why it last did not start
        self._lock = threading.Lock()  # of what follows, held shortly
        self._started = self._closed = False

    def submit(self, job: Work, client: str = "") -> Future[Any]:
        """Queue a job. Raises Busy. The future raises ValueError where the input is at fault, RuntimeError
        where the machine is."""
        self.turns.put(client, job)
        self.start()
        return job.future

    def start(self) -> None:
        """Start the processes in the background, unless they run."""
        with self._lock:
            if self._started or self._closed:
                return
            self._started = True
        for _ in range(_PLACES):
            threading.Thread(target=self._serve, name="farthing-sandbox", daemon=True).start()

    def close(self) -> None:
        """End the processes; jobs that wait or run fail."""
        for job in self.turns.close():
            job.future.cancel()
        with self._lock:
            self._closed = True
        if (server := self._server) is not None:
            server.close()

    def _serve(self) -> None:
        self._add_idle()
        while (turn := self.turns.take()) is not None:
            client, job, credit = turn
            outcome = Outcome(reusable=True)
            try:
                if job.future.set_running_or_notify_cancel():
                    outcome = self._run(job, spent=not credit)
            finally:
                self.turns.done(client, outcome.seconds, job.abandoned)
            if not job.future.cancelled():
                _finish(job, outcome)
            if credit and not outcome.reusable:
                self._add_idle()

    def _run(self, job: Work, spent: bool) -> Outcome:
        """Run a job in an idle or a new worker. A job whose worker was killed from outside is rerun once, in
        a new one, as whoever killed it may have killed all that were idle."""
        error = RuntimeError("the sandbox could not start a process; retry later")
        for again in (False, True):
            worker = (None if again else self._take_idle(spent)) or self._spawn()
            if worker is None:
                break
            try:
                outcome = worker.run(job, spent)
            except Killed as killed:
                error = killed
                continue
            except Exception as broken:  # an answer that makes no sense; no future may be left waiting
                log.exception("sandbox: a worker failed")
                with contextlib.suppress(OSError, EOFError, ValueError):
                    worker.end()
                error = RuntimeError(f"the sandbox failed: {broken!r}")
                break
            if outcome.reusable:
                self._idle[spent].append(worker)
            return outcome
        return Outcome(error=error)

    def _add_idle(self) -> None:
        """Fork a worker ahead of the job that will use it."""
        if (worker := self._spawn()) is not None:
            self._idle[False].append(worker)

    def _take_idle(self, spent: bool) -> Worker | None:
        with contextlib.suppress(IndexError):
            while (worker := self._idle[spent].pop()).server is not self._server:
                pass  # it ended with its fork server
            return worker
        return None

    def _spawn(self) -> Worker | None:
        """A new worker; None where no process can be started. A fork server that has died is replaced."""
        for _ in range(2):
            try:
                server = self._running_server()
            except (OSError, EOFError, ValueError) as error:
                if repr(error) != self._trouble:  # each cause once: every job tries again
                    self._trouble = repr(error)
                    log.error("sandbox: its process does not start: %r", error)
                return None
            if server is None:
                return None
            with contextlib.suppress(OSError, EOFError, ValueError):
                return server.spawn()
            self._discard(server)
        return None

    def _running_server(self) -> ForkServer | None:
        with self._starting:
            if self._server is None and not self._closed:
                self._server = ForkServer(self._setup())
            if self._closed and self._server is not None:  # while it started
                self._server.close()
                self._server = None
            return self._server

    def _discard(self, server: ForkServer) -> None:
        with self._starting:
            if self._server is server:
                self._server = None
                for idle in self._idle.values():
                    idle.clear()
        server.close()


def _finish(job: Work, outcome: Outcome) -> None:
    if outcome.error is not None:
        job.future.set_exception(outcome.error)
    else:
        job.future.set_result(outcome.result)
