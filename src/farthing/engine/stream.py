"""The result of `submit`: the outputs of one request, for a thread or an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from queue import Empty, SimpleQueue

from farthing.engine.request import EngineError, Request, RequestOutput


class RequestStream:
    """Iterate it once, with `for` or `async for`. It ends after the output with `finished`.

    Raises EngineError while iterating if the request failed.
    """

    def __init__(self, request: Request, cancel: Callable[[], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._queue: SimpleQueue[RequestOutput | EngineError] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._done = False
        self._unread = 0  # bytes
        self._limit: tuple[int, Callable[[], object]] | None = None

    def limit_unread(self, most: int, call: Callable[[], object]) -> None:
        """Call a function, once and in the engine's thread, when more than `most` bytes are unread."""
        self._limit = most, call

    @property
    def request_id(self) -> str:
        """The request's id, given or generated."""
        return self.request.request_id

    def cancel(self) -> None:
        """End the request within one step and deliver its output so far with finish_reason "abort"."""
        self._cancel()

    def __iter__(self) -> Iterator[RequestOutput]:
        return self

    def __next__(self) -> RequestOutput:
        if self._done:
            raise StopIteration
        return self._take(self._queue.get())

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        while True:
            try:
                return self._take(self._queue.get_nowait())
            except Empty:
                await self._wait()

    def result(self) -> RequestOutput:
        """Wait for the end and merge all deltas into one output."""
        return merge(self)

    async def aresult(self) -> RequestOutput:
        """`result` from an event loop."""
        return merge([output async for output in self])

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            if not self._queue.empty():
                return
            self._waiter = (loop, future)
        try:
            await future
        finally:
            with self._lock:
                self._waiter = None

    def _take(self, item: RequestOutput | EngineError) -> RequestOutput:
        if isinstance(item, EngineError):
            self._done = True
            raise item
        self._done = item.finished
        if self._limit is not None:
            with self._lock:
                self._unread -= _size(item)
        return item

    def _put(
        self, item: RequestOutput | EngineError
    ) -> tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None:
        self._queue.put(item)
        exceeded = None
        with self._lock:
            waiter, self._waiter = self._waiter, None
            if self._limit is not None and isinstance(item, RequestOutput):
                most, call = self._limit
                self._unread += _size(item)
                if self._unread > most:
                    exceeded, self._limit = call, None
        if exceeded is not None:
            exceeded()
        return waiter


_TOKEN, _LOGPROBS = 256, 2048  # bytes of a token's event, about, and of its log probabilities


def _size(output: RequestOutput) -> int:
    """The bytes of a delta's events, about."""
    return sum(
        len(part.text) + len(part.token_ids) * (_TOKEN if part.logprobs is None else _LOGPROBS)
        for part in output.outputs
    )


def deliver(items: Iterable[tuple[RequestStream, RequestOutput | EngineError]]) -> None:
    """Hand outputs to their streams, waking each event loop once rather than once per stream."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for stream, item in items:
        waiter = stream._put(item)
        if waiter is not None:
            loops.setdefault(waiter[0], []).append(waiter[1])
    for loop, futures in loops.items():
        try:
            loop.call_soon_threadsafe(_wake, futures)
        except RuntimeError:  # the loop is closed, and with it every reader
            continue


def merge(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """Merge a request's outputs into one, with completions in order of their index."""
    last: RequestOutput | None = None
    whole: RequestOutput | None = None
    by_index: dict[int, int] = {}
    for last in outputs:
        if whole is None:
            whole = last
            by_index = {c.index: i for i, c in enumerate(whole.outputs)}
            continue
        for part in last.outputs:
            at = by_index.get(part.index)
            if at is None:
                by_index[part.index] = len(whole.outputs)
                whole.outputs.append(part)
                continue
            mine = whole.outputs[at]
            mine.text += part.text
            mine.token_ids += part.token_ids
            mine.cumulative_logprob = part.cumulative_logprob
            if part.logprobs is not None:
                mine.logprobs = (mine.logprobs or []) + part.logprobs
            mine.finish_reason, mine.stop_reason = part.finish_reason, part.stop_reason
        if last.prompt_logprobs is not None:
            whole.prompt_logprobs = last.prompt_logprobs
    if whole is None or last is None:
        raise EngineError("the stream was consumed before")
    whole.outputs.sort(key=lambda c: c.index)
    whole.finished, whole.metrics, whole.num_cached_tokens = (
        last.finished,
        last.metrics,
        last.num_cached_tokens,
    )
    return whole


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
