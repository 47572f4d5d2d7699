"""Requests, their outputs, and the stream by which a thread or an event loop receives them.

This module imports no torch: a client of the engine can describe requests without loading it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from farthing.conversation import ControlTokens, Conversation, Tags
from farthing.engine.sequence import Missed


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability, its rank from 1, and its text if there is a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Log-probabilities at n positions: column 0 is the next token, then the likeliest, best first.

    A request may need 20 tokens at each of thousands of positions. The engine's thread only keeps arrays;
    `Position` creates Python objects when read, one position at a time.
    """

    ids: NDArray[np.int32]  # [n, 1 + k]
    values: NDArray[np.float32]  # [n, 1 + k]
    ranks: NDArray[np.int32]  # [n], of column 0


class Position(Mapping[int, Logprob]):
    """Log-probabilities at one position by token: the next token, then the `top` likeliest."""

    __slots__ = ("_logprobs", "_row", "_table", "_text", "top")

    def __init__(self, table: Table, row: int, top: int, text: Callable[[int], str] | None = None) -> None:
        """text: maps a token to its text, for `decoded_token`."""
        self._table, self._row, self._text, self.top = table, row, text, top
        self._logprobs: dict[int, Logprob] | None = None

    @property
    def logprob(self) -> float:
        """Log-probability of the next token."""
        return float(self._table.values[self._row, 0])

    def own(self) -> tuple[int, float, int]:
        """(id, log-probability, rank) of the next token."""
        table, row = self._table, self._row
        return int(table.ids[row, 0]), float(table.values[row, 0]), int(table.ranks[row])

    def best(self, count: int) -> Iterator[tuple[int, float]]:
        """(id, log-probability) of the `count` likeliest tokens (at most `top`), best first."""
        end = 1 + min(count, self.top)
        ids, values = self._table.ids[self._row, 1:end], self._table.values[self._row, 1:end]
        return zip(ids.tolist(), values.tolist(), strict=True)

    def entries(self) -> list[tuple[int, float, int]]:
        """(id, log-probability, rank) of each token, the next token first."""
        own = self.own()
        others = enumerate(self.best(self.top), start=1)
        return [own, *((token, value, rank) for rank, (token, value) in others if token != own[0])]

    def __getitem__(self, token: int) -> Logprob:
        return self._dict()[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._dict())

    def __len__(self) -> int:
        return len(self._dict())

    def __repr__(self) -> str:
        return repr(self._dict())

    def _dict(self) -> dict[int, Logprob]:
        if self._logprobs is None:
            text = self._text
            self._logprobs = {
                token: Logprob(value, rank, None if text is None else text(token))
                for token, value, rank in self.entries()
            }
        return self._logprobs


def positions(table: Table, top: Sequence[int], text: Callable[[int], str] | None = None) -> list[Position]:
    """All positions of a table; top[i]: number of likeliest tokens at position i."""
    return [Position(table, row, count, text) for row, count in enumerate(top)]


FinishReason = Literal["stop", "length", "abort", "error"]
OutputKind = Literal["delta", "final"]

GREEDY_BELOW = 1e-5  # temperatures below this are greedy, as in vLLM
MAX_LOGPROBS = 128
SMALLEST_TOP_P = 1e-30  # float32 rounds smaller ones to 0


INTERNAL = "internal error; the server's log has the details"  # names nothing of the engine to a client


class EngineError(RuntimeError):
    """A request, or the whole engine, failed while running."""

    metrics: RequestMetrics | None = None  # what the request had used, where it alone failed


class RequestAtFault(EngineError):
    """A running request cannot continue because of its own parameters (HTTP 400)."""


class QueueFull(EngineError):
    """The waiting queue is at its bound; try again later (HTTP 429)."""


class EngineFailed(EngineError):
    """The engine has failed, and every request with it; another replica may answer (HTTP 503)."""


class EngineStopped(EngineError):
    """The engine is shutting down and accepts no requests (HTTP 503)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Constrain the output. Exactly one field is set."""

    json: Mapping[str, Any] | str | None = None  # a JSON schema
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark, or GBNF as llama.cpp writes it
    json_object: bool | None = None  # any JSON object

    def __post_init__(self) -> None:
        chosen = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(chosen) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise ValueError(
                f"structured_outputs sets {chosen or 'nothing'}; expected exactly one of {names}"
            )
        if self.choice is not None and (isinstance(self.choice, str) or not all(self.choice)):
            raise ValueError(f"choice: got {self.choice!r}; expected a list of non-empty strings")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningParams:
    """Location and budget of the reasoning. Structured output starts after it."""

    end: tuple[int, ...]  # the tokens of its closing tag
    start: int | None = None  # its opening tag, where that is one token
    open: bool = True  # the prompt has already opened it
    budget: int | None = None  # tokens of reasoning at most, the tags not counted; None: no limit

    def __post_init__(self) -> None:
        if not self.end:
            raise ValueError("reasoning.end: got no tokens; expected those of the closing tag")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"reasoning.budget: got {self.budget}; expected at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallParams:
    """Tool calls in free text: after each of `openers` the grammar holds until it ends.

    Without openers there is no free text: the grammar is that of the whole answer.
    """

    openers: tuple[str, ...]
    grammar: str  # Lark, of what follows an opener

    def __post_init__(self) -> None:
        if not all(self.openers):
            raise ValueError(f"calls.openers: got {self.openers!r}; expected non-empty strings")

    @property
    def constraint(self) -> StructuredOutputsParams:
        """The grammar alone."""
        return StructuredOutputsParams(grammar=self.grammar)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample, when to stop, what to report. Raises ValueError naming the field at fault."""

    n: int = 1  # completions of the same prompt
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or -1: all
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the most likely token
    repetition_penalty: float = 1.0  # over prompt and output; divides positive logits, multiplies negative
    presence_penalty: float = 0.0  # subtracted once for a token in the output
    frequency_penalty: float = 0.0  # subtracted for each occurrence in the output
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None  # None: drawn from the engine's seed
    max_tokens: int | None = 16  # None: up to max_model_len
    min_tokens: int = 0  # no stop of any kind before
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # of the k most likely tokens and the sampled one, from the raw logits
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    marked_token_ids: frozenset[int] = frozenset()  # in the text, conversation.marks.MARK precedes each
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    reasoning: ReasoningParams | None = None
    calls: CallParams | None = None  # not together with structured_outputs
    bad_words: Sequence[str] | None = None  # texts the output never holds, as the tokenizer splits them
    allowed_token_ids: Sequence[int] | None = None  # no other token is drawn
    # What to report of the prompt's last token, with max_tokens 1: the hidden state that the head reads, or
    # the logits of these tokens. The token that follows means nothing.
    probe: Literal["hidden"] | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, low, high, kind in RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            accepted = (int,) if kind is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, accepted) or not low <= value <= high:
                raise ValueError(f"{name}: got {value!r}; expected {kind.__name__} in [{low}, {high}]")
        if self.top_p < SMALLEST_TOP_P:
            raise ValueError(f"top_p: got {self.top_p!r}; expected a float in [{SMALLEST_TOP_P}, 1]")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: got {self.min_tokens}; expected at most max_tokens = {self.max_tokens}"
            )
        if self.stop is not None:
            self._check_stop()
        if self.calls is not None and self.structured_outputs is not None:
            raise ValueError("calls: got a value with structured_outputs; expected one of them")
        if self.probe is not None and (self.max_tokens, self.n) != (1, 1):
            raise ValueError(f"probe: got {self.probe!r}; expected None, or max_tokens 1 and n 1")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int) or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias has {token!r}: {bias!r}; expected token id: bias in [-100, 100]"
                )

    def _check_stop(self) -> None:
        if self.stop_strings and not self.detokenize:
            raise ValueError("detokenize: got False; expected True with stop strings")
        if not all(self.stop_strings):
            raise ValueError(f"stop: got {self.stop!r}; expected non-empty strings")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


RANGES: tuple[tuple[str, float, float, type], ...] = (
    ("n", 1, 128, int),
    ("temperature", 0, 100, float),
    ("top_k", -1, 2**31, int),
    ("top_p", 0, 1, float),
    ("min_p", 0, 1, float),
    ("repetition_penalty", 0.01, 100, float),
    ("presence_penalty", -2, 2, float),
    ("frequency_penalty", -2, 2, float),
    ("seed", -(2**63), 2**64, int),
    ("max_tokens", 1, 2**31, int),
    ("min_tokens", 0, 2**31, int),
    ("logprobs", 0, MAX_LOGPROBS, int),
    ("prompt_logprobs", 0, MAX_LOGPROBS, int),
)
_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


@dataclass(slots=True)
class RequestMetrics:
    """What a request used. Times are `time.time()` seconds; 0.0: has not happened."""

    arrival_time: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
    prefill_tokens: int = 0  # prompt tokens computed, recomputation after preemption included
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    missed: Missed | None = None  # why the others were not; None: the cache was not read
    decode_tokens: int = 0  # output tokens
    # Wall time of the engine's steps, shared over the tokens of each step.
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n completions. In a delta, text, token_ids and logprobs hold what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Position] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it

    @property
    def finished(self) -> bool:
        """Whether this completion is whole."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """News of a request. In a delta, `outputs` holds only the completions that moved."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[Position | None] | None = None
    num_cached_tokens: int = 0
    probe: NDArray[np.float32] | None = None  # [D], or [tokens]; see SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A checked request on its way to the engine's thread."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0  # smaller is more urgent
    cache_salt: str = ""  # requests share cached prefixes only under the same salt
    client: str = ""  # whose request it is: clients share the engine fairly
    kind: OutputKind = "delta"
    arrival_time: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


class RequestStream:
    """Iterate it once, with `for` or `async for`. It ends after the output with `finished`.

    Raises EngineError while iterating if the request failed.
    """

    def __init__(
        self, request: Request, cancel: Callable[[], None], metrics: RequestMetrics | None = None
    ) -> None:
        """metrics: what the engine keeps up to date while the request runs."""
        self.request, self.metrics = request, metrics
        self._cancel = cancel
        self._queue: SimpleQueue[RequestOutput | EngineError] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self.done = False  # its last output was taken
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
        if self.done:
            raise StopIteration
        return self._take(self._queue.get())

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.done:
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
            self.done = True
            raise item
        self.done = item.finished
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


def deliver(
    items: Iterable[tuple[RequestStream, RequestOutput | EngineError]],
) -> list[tuple[RequestStream, Exception]]:
    """Hand outputs to their streams, waking each event loop once rather than once per stream.

    Returns the streams that could not take theirs, and why.
    """
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    refused: list[tuple[RequestStream, Exception]] = []
    for stream, item in items:
        try:
            waiter = stream._put(item)
        except Exception as error:
            refused.append((stream, error))
            continue
        if waiter is not None:
            loops.setdefault(waiter[0], []).append(waiter[1])
    for loop, futures in loops.items():
        try:
            loop.call_soon_threadsafe(_wake, futures)
        except RuntimeError:  # the loop is closed, and with it every reader
            continue
    return refused


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


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation to be rendered, and how. form: a packaged format's name; None: the model's own template.
    efforts: see `template.arguments`. trusted: nothing is marked."""

    conversation: Conversation
    form: str | None
    tags: Tags
    control: ControlTokens
    efforts: tuple[str, ...]
    trusted: bool

    def document(self) -> dict[str, Any]:
        """JSON of which `of_document` makes the same, in another process."""
        return {
            "conversation": self.conversation.document(),
            "form": self.form,
            "tags": asdict(self.tags),
            "control": asdict(self.control),
            "efforts": self.efforts,
            "trusted": self.trusted,
        }

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Rendering:
        """What `document` describes."""
        parts = {
            "conversation": Conversation.of_document(document["conversation"]),
            "tags": Tags(**document["tags"]),
            "control": ControlTokens(**document["control"]),
            "efforts": tuple(document["efforts"]),
        }
        return cls(**{**document, **parts})
