"""What clients send that has to become tokens or grammars, checked and converted within bounds."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from hashlib import sha256
from reprlib import Repr
from typing import Any, TypeVar

from farthing.engine.request import StructuredOutputsParams
from farthing.engine.sandbox.local import Local
from farthing.engine.sandbox.pool import Pool
from farthing.engine.sandbox.verdicts import InFlight, Verdicts
from farthing.engine.sandbox.workers import Job
from farthing.engine.structured import check_size, constrained_field
from farthing.engine.tokenizer import Tokenizer
from farthing.json_size import json_size

T = TypeVar("T")

_SHORT = 4_096  # characters that tokenize in a few milliseconds: a thread is enough
_LIGHT = 131_072  # characters; a larger text may take longer
_LIGHT_SECONDS, _HEAVY_SECONDS, _GRAMMAR_SECONDS = 2.0, 20.0, 2.0  # CPU time of a job
_TEXT_MEMORY, _GRAMMAR_MEMORY = 1 << 30, 512 << 20  # bytes that a job may add
_BRIEF = Repr()  # writes the beginning of a value
_BRIEF.maxstring = 80


class Sandbox:
    """The untrusted work of one engine. Thread-safe; processes start when they are needed.

    Each method takes the client that its work is for: clients take turns (see `turns`). All raise Busy for a
    client with too much waiting. Futures raise ValueError where the input is refused or exceeds its limits,
    and RuntimeError where the machine is at fault.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer

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
        total = self._local.turns.seconds()
        for client, seconds in self._pool.turns.seconds().items():
            total[client] = total.get(client, 0.0) + seconds
        return total

    def seconds_of(self, client: str) -> float:
        """CPU time that one client has used so far."""
        return self._local.turns.seconds_of(client) + self._pool.turns.seconds_of(client)

    def here(self, call: Callable[[], T], client: str = "") -> Future[T]:
        """Short work of the caller's own, in a thread."""
        return self._local.submit(call, client)

    def encode(
        self, texts: Sequence[str], add_special_tokens: bool = True, client: str = ""
    ) -> Future[list[list[int]]]:
        """Token ids of each text."""
        if _is_short(texts):
            return self._local.submit(lambda: self._encode(texts, add_special_tokens), client)
        arguments = {"texts": list(texts), "add_special_tokens": add_special_tokens}
        return self._submit("encode", arguments, "the text", sum(map(len, texts)), client)

    def encode_now(
        self, texts: Sequence[str], add_special_tokens: bool = True, client: str = ""
    ) -> list[list[int]]:
        """The same for a caller in a thread of its own, or in `here`, which may wait."""
        if _is_short(texts):
            return self._encode(texts, add_special_tokens)
        return self.encode(texts, add_special_tokens, client).result()

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], client: str = "") -> Future[str]:
        """The text of token ids, special ones included."""
        if len(ids) <= _SHORT:
            return self._local.submit(lambda: self._tokenizer.decode(ids, skip_special_tokens=False), client)
        return self._submit("decode", {"ids": ids}, "tokens", len(ids), client)

    def chat(self, conversation: Mapping[str, Any], max_characters: int, client: str = "") -> Future[str]:
        """The prompt of a conversation: keyword arguments of `Tokenizer.render_chat`.

        The built-in template is linear in its input; a model's own may do anything.
        """
        size = json_size(conversation)
        if self._tokenizer.trusted_template and size <= _SHORT:
            return self._local.submit(lambda: self._tokenizer.render_chat(**conversation), client)
        arguments = {"conversation": conversation, "max_characters": max_characters}
        return self._submit("chat", arguments, "messages", size, client)

    def habits(self) -> Future[dict[str, Any]]:
        """What the chat template expects of messages: fields of `Habits`."""
        return self._submit("habits", {}, "the chat template", 0, "")

    def grammar(self, constraint: StructuredOutputsParams, client: str = "") -> Future[str]:
        """The text of a constraint's grammar, for `GrammarCompiler.build`.

        A worker has compiled it and drawn from it, so compiling it again neither crashes nor takes long.
        Raises ValueError at once for a constraint that is too large. A client's requests for the same grammar
        share one job. Those of two clients do not, or one would wait for its turn in the other's queue.
        """
        check_size(constraint)
        arguments = _arguments(constraint)
        key = _digest(arguments)
        known = self._verdicts.get(key)
        if known is not None:
            return known

        def begin() -> Job:
            field = constrained_field(constraint)
            what = f"structured_outputs.{field} ({_BRIEF.repr(arguments[field])})"
            limits = _GRAMMAR_SECONDS, _GRAMMAR_MEMORY
            job = Job("grammar", {"constraint": arguments}, what, *limits, size=json_size(arguments))
            self._pool.submit(job, client).add_done_callback(lambda done: self._verdicts.put(key, done))
            return job

        return self._in_flight.join(client, key, begin)

    def condemn(self, constraint: StructuredOutputsParams, why: str) -> None:
        """Refuse this constraint from now on: it turned out to be too slow in use."""
        refused: Future[str] = Future()
        refused.set_exception(ValueError(why))
        self._verdicts.put(_digest(_arguments(constraint)), refused)

    def _submit(
        self, name: str, arguments: Mapping[str, Any], what: str, size: int, client: str
    ) -> Future[Any]:
        seconds = _LIGHT_SECONDS if size <= _LIGHT else _HEAVY_SECONDS
        return self._pool.submit(Job(name, arguments, what, seconds, _TEXT_MEMORY, size), client)


def _is_short(texts: Sequence[str]) -> bool:
    return sum(map(len, texts)) <= _SHORT


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
