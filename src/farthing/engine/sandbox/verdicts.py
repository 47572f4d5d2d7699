"""Verdicts on inputs: the last ones, and those that are being reached."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from farthing.engine.sandbox.turns import Busy
from farthing.engine.sandbox.workers import Job

_MAX_BYTES, _MAX_VERDICTS = 16 << 20, 1024
_MAX_CALLERS = 1024  # of one client


class Verdicts:
    """Remembers what was decided, bounded in number and bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[Future[str], int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> Future[str] | None:
        """The verdict on an input: a future that is done."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key][0]

    def put(self, key: bytes, verdict: Future[str]) -> None:
        """Remember a future that is done."""
        if verdict.cancelled():
            return
        error = verdict.exception()
        if error is not None and not isinstance(error, ValueError):
            return  # not the input's fault: try again next time
        size = len(verdict.result()) if error is None else len(str(error))
        if error is not None:  # a traceback would keep the input alive
            verdict = Future()
            verdict.set_exception(type(error)(*error.args))
        with self._lock:
            self._drop(key)
            self._known[key] = (verdict, size)
            self._bytes += size
            while self._bytes > _MAX_BYTES or len(self._known) > _MAX_VERDICTS:
                self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        _, size = self._known.pop(key, (None, 0))
        self._bytes -= size


class InFlight:
    """Callers of one client that want the same work while it is in flight share it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: dict[tuple[str, bytes], tuple[Job, list[Future[str]]]] = {}
        self._callers: Counter[str] = Counter()  # by client

    def join(self, client: str, work_key: bytes, begin: Callable[[], Job]) -> Future[str]:
        """A future of its own for this caller. The job is cancelled once every caller has cancelled; one that
        runs is abandoned.

        Raises Busy for a client with too many callers.
        """
        mine: Future[str] = Future()
        key = client, work_key
        with self._lock:
            if self._callers[client] >= _MAX_CALLERS:
                raise Busy(f"{_MAX_CALLERS} requests of this key wait for their grammars; retry later")
            shared = self._shared.get(key)
            if shared is None:
                work, callers = begin(), [mine]
                self._shared[key] = work, callers
            else:
                work, callers = shared
                callers.append(mine)
                work.abandoned = False
            self._callers[client] += 1
        if shared is None:
            work.future.add_done_callback(lambda _: self._deliver(key, work))
        mine.add_done_callback(lambda done: self._left(key, done, work, callers))
        return mine

    def _left(self, key: tuple[str, bytes], mine: Future[str], work: Job, callers: list[Future[str]]) -> None:
        with self._lock:
            self._callers[key[0]] -= 1
            if not self._callers[key[0]]:
                del self._callers[key[0]]
            if not mine.cancelled() or not all(caller.cancelled() for caller in callers):
                return
            current = self._shared.get(key)
            if current is not None and current[0] is work and not work.future.running():
                del self._shared[key]  # later callers begin again
        if not work.future.cancel():
            work.abandon()

    def _deliver(self, key: tuple[str, bytes], work: Job) -> None:
        with self._lock:
            current = self._shared.get(key)
            callers = current[1] if current is not None and current[0] is work else []
            if callers:
                del self._shared[key]
        for caller in callers:
            if not caller.set_running_or_notify_cancel():
                continue
            if work.future.cancelled():
                caller.set_exception(RuntimeError("the sandbox is closed"))
            elif (error := work.future.exception()) is not None:
                caller.set_exception(error)
            else:
                caller.set_result(work.future.result())
