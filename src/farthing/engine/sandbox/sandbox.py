"""What clients send that has to become tokens or grammars, checked and converted within bounds."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from farthing.engine.request import StructuredOutputsParams
from farthing.engine.sandbox.pool import Job, Lane
from farthing.engine.structured import check_size
from farthing.engine.tokenizer import Tokenizer

_SHORT = 4_096  # characters that tokenize in a few milliseconds: a thread is enough
_LIGHT = 131_072  # characters; above this, work goes to the heavy lane
_LIGHT_SECONDS, _HEAVY_SECONDS, _GRAMMAR_SECONDS = 5.0, 20.0, 5.0  # wall clock, of a job
_CACHED_BYTES, _CACHED_VERDICTS = 16 << 20, 1024


class Sandbox:
    """The untrusted work of one engine. Thread-safe; children start when they are needed.

    Futures raise ValueError where the input is refused, fails, or takes too long.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer

        def setup() -> dict[str, Any]:
            return {"tokenizer": tokenizer.state(), "vocab_size": vocab_size}

        self._threads = ThreadPoolExecutor(1, "farthing-short")
        self._light = Lane(setup)
        self._heavy = Lane(setup, children=max(1, (os.cpu_count() or 1) // 4), niceness=10)
        self._compiling = Lane(setup, niceness=10)
        self._verdicts = _Verdicts()
        self._parts = (self._light, self._heavy, self._compiling, self._threads)
        weakref.finalize(self, _close, *self._parts)

    def warm(self) -> None:
        """Start the child that renders and tokenizes, ahead of the first request."""
        self._light.warm()

    def close(self) -> None:
        """Kill the children."""
        _close(*self._parts)

    def encode(
        self, texts: Sequence[str], add_special_tokens: bool = True, client: str = ""
    ) -> Future[list[list[int]]]:
        """Token ids of each text."""
        size = sum(map(len, texts))
        if size <= _SHORT:
            return self._threads.submit(
                lambda: [self._tokenizer.encode(text, add_special_tokens) for text in texts]
            )
        arguments = {"texts": list(texts), "add_special_tokens": add_special_tokens}
        return self._submit("encode", arguments, size, client)

    def decode(self, ids: Sequence[int], client: str = "") -> Future[str]:
        """The text of token ids, special ones included."""
        if len(ids) <= _SHORT:
            return self._threads.submit(self._tokenizer.decode, ids, skip_special_tokens=False)
        return self._submit("decode", {"ids": ids}, len(ids), client)

    def chat(self, conversation: Mapping[str, Any], max_characters: int, client: str = "") -> Future[str]:
        """The prompt of a conversation: keyword arguments of `Tokenizer.render_chat`.

        The built-in template is linear in its input; a model's own may do anything.
        """
        size = _size(conversation)
        if self._tokenizer.trusted_template and size <= _SHORT:
            return self._threads.submit(lambda: self._tokenizer.render_chat(**conversation))
        arguments = {"conversation": conversation, "max_characters": max_characters}
        return self._submit("chat", arguments, size, client)

    def grammar(self, constraint: StructuredOutputsParams, client: str = "") -> Future[str]:
        """The text of a constraint's grammar, for `GrammarCompiler.build`.

        A child has compiled it and drawn from it, so compiling it again neither crashes nor takes long.
        Raises ValueError at once for a constraint that is too large.
        """
        check_size(constraint)
        arguments = asdict(constraint)
        try:
            key = _digest(arguments)
        except TypeError as error:
            raise ValueError(f"structured_outputs cannot be written as JSON: {error}") from error
        known = self._verdicts.get(key)
        if known is not None:
            return known
        job = Job("grammar", {"constraint": arguments}, _GRAMMAR_SECONDS)
        future = self._compiling.submit(job, client)
        future.add_done_callback(lambda done: self._verdicts.put(key, done))
        return future

    def condemn(self, constraint: StructuredOutputsParams, why: str) -> None:
        """Refuse this constraint from now on: it turned out to be too slow in use."""
        refused: Future[str] = Future()
        refused.set_exception(ValueError(why))
        self._verdicts.put(_digest(asdict(constraint)), refused)

    def _submit(self, name: str, arguments: Mapping[str, Any], size: int, client: str) -> Future[Any]:
        light = size <= _LIGHT
        job = Job(name, arguments, _LIGHT_SECONDS if light else _HEAVY_SECONDS)
        return (self._light if light else self._heavy).submit(job, client)


class _Verdicts:
    """The last verdicts on grammars, bounded in number and bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[Future[str], int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> Future[str] | None:
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key][0]

    def put(self, key: bytes, verdict: Future[str]) -> None:
        if verdict.cancelled():
            return
        error = verdict.exception()
        if error is not None and not isinstance(error, ValueError):
            return  # not the grammar's fault: try again next time
        size = len(verdict.result()) if error is None else len(str(error))
        if error is not None:  # a traceback would keep the input alive
            verdict = Future()
            verdict.set_exception(type(error)(*error.args))
        with self._lock:
            self._drop(key)
            self._known[key] = (verdict, size)
            self._bytes += size
            while self._bytes > _CACHED_BYTES or len(self._known) > _CACHED_VERDICTS:
                self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        _, size = self._known.pop(key, (None, 0))
        self._bytes -= size


def _digest(arguments: Mapping[str, Any]) -> bytes:
    return sha256(json.dumps(arguments).encode()).digest()  # in order: properties are written in theirs


def _size(value: Any) -> int:
    """Characters of all strings in a document, and one for each value."""
    size, stack = 0, [value]
    while stack:
        item = stack.pop()
        size += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            size += sum(len(str(key)) for key in item)
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return size


def _close(*parts: Lane | ThreadPoolExecutor) -> None:
    for part in parts:
        if isinstance(part, Lane):
            part.close()
        else:
            with contextlib.suppress(RuntimeError):
                part.shutdown(wait=False, cancel_futures=True)
