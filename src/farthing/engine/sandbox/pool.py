"""Runs jobs in forked workers, several at once; a job that ends its worker costs no other job anything."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from farthing.engine.sandbox.turns import Turns
from farthing.engine.sandbox.workers import ForkServer, Job, Killed, Outcome, Worker

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
        self.turns: Turns[Job] = Turns(_PLACES, _PLACES_EACH, _CREDIT_SECONDS, _REFILL)
        self._idle: dict[bool, list[Worker]] = {
            False: [],
            True: [],
        }  # by whether they run spent clients' jobs
        self._starting = threading.Lock()  # of the fork server
        self._server: ForkServer | None = None
        self._trouble = ""  # why it last did not start
        self._lock = threading.Lock()  # of what follows, held shortly
        self._started = self._closed = False

    def submit(self, job: Job, client: str = "") -> Future[Any]:
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

    def _run(self, job: Job, spent: bool) -> Outcome:
        """Run a job in an idle or a new worker. A job whose worker was killed from outside is rerun once."""
        error = RuntimeError("the sandbox could not start a process; retry later")
        for _ in range(2):
            worker = self._take_idle(spent) or self._spawn()
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


def _finish(job: Job, outcome: Outcome) -> None:
    if outcome.error is not None:
        job.future.set_exception(outcome.error)
    else:
        job.future.set_result(outcome.result)
