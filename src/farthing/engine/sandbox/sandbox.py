"""What clients send that has to become tokens or grammars, checked and converted within bounds."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
from hashlib import sha256
from reprlib import Repr
from typing import Any, TypeVar

from farthing.conversation.types import Conversation
from farthing.engine.request import Rendering, StructuredOutputsParams
from farthing.engine.sandbox.turns import WorkQueue
from farthing.engine.sandbox.workers import Pool, Work
from farthing.engine.structured import check_size, constrained_field
from farthing.engine.tokenizer import Tokenizer
from farthing.files import json_size
from farthing.shares import Busy, Shares

# Verdicts on inputs: the last ones, and those that are being reached.

_MAX_BYTES, _MAX_VERDICTS = 16 << 20, 1024
_MAX_CALLERS = 1024  # of one client


def _settle(mine: Future[str], done: Future[str]) -> None:
    """Settle a caller's future as another one is. An exception is copied: every raise adds to its traceback,
    which would grow with each caller and keep what their frames hold."""
    error = done.exception()
    if error is None:
        mine.set_result(done.result())
    else:
        mine.set_exception(copy(error))


class Verdicts:
    """Remembers what was decided, bounded in number and bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[Future[str], int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> Future[str] | None:
        """The verdict on an input: a future that is done, of the caller's own."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            known = self._known[key][0]
        mine: Future[str] = Future()
        _settle(mine, known)
        return mine

    def put(self, key: bytes, verdict: Future[str]) -> None:
        """Remember a future that is done."""
        if verdict.cancelled():
            return
        error = verdict.exception()
        if error is not None and not isinstance(error, ValueError):
            return  # not the input's fault: try again next time
        size = len(verdict.result()) if error is None else len(str(error))
        if error is not None:  # its traceback would keep the input alive
            refused: Future[str] = Future()
            _settle(refused, verdict)
            verdict = refused
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
        self._shared: dict[tuple[str, bytes], tuple[Work, list[Future[str]]]] = {}
        self._callers = Shares(_MAX_CALLERS)

    def join(self, client: str, work_key: bytes, begin: Callable[[], Work]) -> Future[str]:
        """A future of its own for this caller. The job is cancelled once every caller has cancelled; one that
        runs is abandoned.

        Raises Busy for a client with too many callers.
        """
        mine: Future[str] = Future()
        key = client, work_key
        with self._lock:
            if self._callers.room(client) < 1:
                raise Busy(f"{_MAX_CALLERS} requests of this key wait for their grammars; retry later")
            shared = self._shared.get(key)
            if shared is None:
                work, callers = begin(), [mine]
                self._shared[key] = work, callers
            else:
                work, callers = shared
                callers.append(mine)
                work.abandoned = False
            self._callers.charge(client, 1)
        if shared is None:
            work.future.add_done_callback(lambda _: self._deliver(key, work))
        mine.add_done_callback(lambda done: self._left(key, done, work, callers))
        return mine

    def _left(
        self, key: tuple[str, bytes], mine: Future[str], work: Work, callers: list[Future[str]]
    ) -> None:
        with self._lock:
            self._callers.charge(key[0], -1)
            if not mine.cancelled() or not all(caller.cancelled() for caller in callers):
                return
            current = self._shared.get(key)
            if current is not None and current[0] is work and not work.future.running():
                del self._shared[key]  # later callers begin again
        if not work.future.cancel():
            work.abandon()

    def _deliver(self, key: tuple[str, bytes], work: Work) -> None:
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
            else:
                _settle(caller, work.future)


# Short work in threads of the engine's process, in the same fair order as the work of child processes.

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
        self.turns: WorkQueue[_Call] = WorkQueue(_THREADS, 1, unlimited, 0.0, max_waiting=4096)
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


_HERE = 2_048  # characters that render and tokenize in one or two milliseconds, or four where all are rare
_SHORT = 4_096  # characters that tokenize in a few milliseconds: a thread is enough
_PER_TURN = 16  # characters that stand for the work on a turn without text
_PER_OBJECT = 48  # characters that stand for the names of an object's fields
_LIGHT = 131_072  # characters; a larger text may take longer
_LIGHT_SECONDS, _HEAVY_SECONDS, _GRAMMAR_SECONDS = 2.0, 20.0, 2.0  # CPU time of a job
_TEXT_MEMORY, _GRAMMAR_MEMORY = 1 << 30, 512 << 20  # bytes that a job may add
_BRIEF = Repr()  # writes the beginning of a value
_BRIEF.maxstring = 80


class Sandbox:
    """The untrusted work of one engine. Thread-safe; processes start when they are needed.

    Each method takes the client that its work is for: clients take turns (`turns.py`). All raise Busy for a
    client with too much waiting. Futures raise ValueError for an input that is refused or exceeds its limits,
    RuntimeError where the machine is at fault. That of a text that takes less than a thread is done at once.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._here: defaultdict[str, float] = defaultdict(float)  # CPU seconds in the callers' threads

        def setup() -> dict[str, Any]:
            return {"tokenizer": tokenizer.state(), "vocab_size": vocab_size}

        self._local, self._pool = Local(), Pool(setup)
        self._verdicts, self._in_flight = Verdicts(), InFlight()
        weakref.finalize(self, _close, self._local, self._pool)

    def start(self) -> None:
        """Start the processes ahead of the first request."""
        self._pool.start()

    def close(self) -> None:
        """End the processes and threads."""
        _close(self._local, self._pool)

    def seconds(self) -> Mapping[str, float]:
        """CPU time used so far, by client."""
        with self._lock:
            total = dict(self._here)
        for turns in (self._local.turns, self._pool.turns):
            for client, seconds in turns.seconds().items():
                total[client] = total.get(client, 0.0) + seconds
        return total

    def seconds_of(self, client: str) -> float:
        """CPU time that one client has used so far."""
        with self._lock:
            here = self._here.get(client, 0.0)
        return here + self._local.turns.seconds_of(client) + self._pool.turns.seconds_of(client)

    def here(self, call: Callable[[], T], client: str = "") -> Future[T]:
        """Short work of the caller's own, in a thread."""
        return self._local.submit(call, client)

    def encode(
        self, texts: Sequence[str], add_special_tokens: bool = True, client: str = "", plain: bool = False
    ) -> Future[list[list[int]]]:
        """Token ids of each text. plain: nothing in it becomes a control token."""
        size = sum(map(len, texts))
        encode = partial(self._tokenizer.encode, add_special_tokens=add_special_tokens, plain=plain)
        if size <= _HERE:
            return self._at_once(lambda: list(map(encode, texts)), client)
        if size <= _SHORT:
            return self._local.submit(lambda: list(map(encode, texts)), client)
        arguments = {"texts": list(texts), "add_special_tokens": add_special_tokens, "plain": plain}
        return self._submit("encode", lambda: arguments, "the text", size, client)

    def encode_now(
        self, texts: Sequence[str], add_special_tokens: bool = True, client: str = ""
    ) -> list[list[int]]:
        """The same for a caller in a thread of its own, or in `here`, which may wait."""
        if sum(map(len, texts)) <= _SHORT:
            return [self._tokenizer.encode(text, add_special_tokens) for text in texts]
        return self.encode(texts, add_special_tokens, client).result()

    def decode(self, ids: Sequence[int], client: str = "") -> Future[str]:
        """The text of token ids, special ones included."""
        if len(ids) <= _SHORT:
            return self._local.submit(lambda: self._tokenizer.decode(ids, skip_special_tokens=False), client)
        return self._submit("decode", lambda: {"ids": ids}, "tokens", len(ids), client)

    def prompt(self, rendering: Rendering, max_tokens: int, client: str = "") -> Future[str]:
        """The prompt of a conversation.

        Packaged formats are linear in their input; a model's own template may do anything.
        """
        conversation = rendering.conversation
        if rendering.form is not None and conversation.is_brief(_HERE, _PER_TURN):
            return self._at_once(lambda: self._tokenizer.prompt(rendering), client)
        size = _size(conversation)
        if rendering.form is not None and size <= _SHORT:
            return self._local.submit(lambda: self._tokenizer.prompt(rendering), client)
        longest = self._tokenizer.max_characters(max_tokens)
        return self._submit(
            "prompt",
            lambda: {"rendering": rendering.document(), "max_characters": longest},
            "messages",
            size,
            client,
        )

    def chat(self, chat: Mapping[str, Any], max_tokens: int) -> Future[str]:
        """The prompt of messages in OpenAI's form, by the model's own template. Raises ValueError at once for
        values that are not JSON."""
        try:
            size = len(json.dumps(chat))
        except (TypeError, RecursionError) as error:
            raise ValueError(
                f"messages: expected values of JSON, also in tools and options: {error}"
            ) from None
        arguments = {**chat, "max_characters": self._tokenizer.max_characters(max_tokens)}
        return self._submit("chat", lambda: arguments, "messages", size, "")

    def habits(self) -> Future[dict[str, Any]]:
        """What the chat template expects of messages: fields of `Habits`."""
        return self._submit("habits", dict, "the chat template", 0, "")

    def grammar(self, constraint: StructuredOutputsParams, client: str = "") -> Future[str]:
        """The text of a constraint's grammar, for `GrammarCompiler.build`.

        A worker has compiled it and drawn from it, so compiling it again neither crashes nor takes long.
        Raises ValueError at once for a constraint that is too large. A client's requests for the same grammar
        share one job. Those of two clients do not, or one would wait for its turn in the other's queue.
        """
        check_size(constraint)
        arguments = _arguments(constraint)
        key = _digest(arguments)
        verdict = self._verdicts.get(key)
        if verdict is not None:
            return verdict

        def begin() -> Work:
            field = constrained_field(constraint)
            what = f"structured_outputs.{field} ({_BRIEF.repr(arguments[field])})"
            limits = _GRAMMAR_SECONDS, _GRAMMAR_MEMORY
            job = Work("grammar", lambda: {"constraint": arguments}, what, *limits, size=json_size(arguments))
            self._pool.submit(job, client).add_done_callback(lambda done: self._verdicts.put(key, done))
            return job

        return self._in_flight.join(client, key, begin)

    def condemn(self, constraint: StructuredOutputsParams, why: str) -> None:
        """Refuse this constraint from now on: it turned out to be too slow in use."""
        refused: Future[str] = Future()
        refused.set_exception(ValueError(why))
        self._verdicts.put(_digest(_arguments(constraint)), refused)

    def _at_once(self, work: Callable[[], T], client: str) -> Future[T]:
        """Do brief work in the caller's thread, and account for it."""
        done: Future[T] = Future()
        began = time.thread_time()
        try:
            done.set_result(work())
        except Exception as error:  # the caller's
            done.set_exception(error)
        with self._lock:
            self._here[client] += time.thread_time() - began
        return done

    def _submit(
        self, name: str, arguments: Callable[[], Mapping[str, Any]], what: str, size: int, client: str
    ) -> Future[Any]:
        seconds = _LIGHT_SECONDS if size <= _LIGHT else _HEAVY_SECONDS
        return self._pool.submit(Work(name, arguments, what, seconds, _TEXT_MEMORY, size), client)


def _size(conversation: Conversation) -> int:
    """About how many characters a conversation has, everything included."""
    size = json_size(conversation.template_options)
    for turn in conversation.turns:
        size += _PER_OBJECT + len(turn.text) + len(turn.reasoning) + len(turn.call_id or turn.name or "")
        size += json_size(turn.extra) if turn.extra else 0
        size += sum(_PER_OBJECT + len(call.id) + len(call.name) + len(call.arguments) for call in turn.calls)
    for tool in conversation.tools:
        size += _PER_OBJECT + len(tool.name) + len(tool.description or "") + json_size(tool.parameters)
    return size


def _arguments(constraint: StructuredOutputsParams) -> dict[str, Any]:
    return {field.name: getattr(constraint, field.name) for field in fields(constraint)}


def _digest(arguments: Mapping[str, Any]) -> bytes:
    """In order: a grammar writes the properties of a schema in theirs. Raises ValueError."""
    try:
        return sha256(json.dumps(arguments).encode()).digest()
    except TypeError as error:
        raise ValueError(f"structured_outputs cannot be written as JSON: {error}") from error


def _close(*parts: Local | Pool) -> None:
    for part in parts:
        part.close()
