"""The sandbox's own side: a fork server and workers that run untrusted input under limits.

The server loads the tokenizer and the grammar compiler once and forks a worker whenever its parent requests
one, so that a worker costs milliseconds and shares the tokenizer's memory. It imports no torch, has one
thread, and never touches the input of a job. A worker runs one job at a time on a small stack: what fits
there fits many times over in the stacks of the engine's process, which repeats an accepted grammar's
compilation.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

from farthing import process
from farthing.engine.request import Rendering, StructuredOutputsParams
from farthing.engine.structured import GrammarCompiler, examine
from farthing.engine.tokenizer import Tokenizer

# Length-prefixed JSON over a socket: the parent never unpickles what a child sends.

MAX_BYTES = 256 << 20  # of one frame
READY = "ready"  # a fork server's first frame, or else why it cannot start


def send(
    connection: socket.socket, document: Any, deadline: float | None = None, descriptor: int | None = None
) -> None:
    """Write one document, with an open file if one is given.

    Raises TimeoutError at the deadline (monotonic seconds), OSError on a dead peer.
    """
    data = json.dumps(document).encode()  # ASCII: a lone surrogate survives as an escape
    data = len(data).to_bytes(8, "little") + data
    _arm(connection, deadline)
    if descriptor is not None:
        data = data[socket.send_fds(connection, [data], [descriptor]) :]
    connection.sendall(data)


def receive(connection: socket.socket, deadline: float | None = None) -> Any:
    """Read one document. Raises EOFError when the peer has closed, TimeoutError, OSError, ValueError."""
    return _document(connection, _read(connection, 8, deadline), deadline)


def receive_with_descriptor(connection: socket.socket) -> tuple[Any, int | None]:
    """Read one document and the open file sent with it, if any. Raises EOFError, OSError, ValueError."""
    head, descriptors, *_ = socket.recv_fds(connection, 8, 1)
    if not head:
        raise EOFError
    head += _read(connection, 8 - len(head), None)
    return _document(connection, head, None), next(iter(descriptors), None)


def _document(connection: socket.socket, head: bytes | bytearray, deadline: float | None) -> Any:
    size = int.from_bytes(head, "little")
    if size > MAX_BYTES:
        raise ValueError(f"frame of {size} bytes; expected at most {MAX_BYTES}")
    return json.loads(_read(connection, size, deadline))


def _read(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray()
    while len(data) < size:
        _arm(connection, deadline)
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return data


def _arm(connection: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        connection.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)


_STACK_BYTES = 1 << 20  # a job may add
_RETIRE_BYTES = 64 << 20  # after a job that added this much, the worker is replaced


class Jobs:
    """What a worker can do, by name."""

    def __init__(self, setup: Mapping[str, Any]) -> None:

        self._tokenizer = Tokenizer.from_state(setup["tokenizer"])
        self._tokenizer.prepare()
        self._compiler: GrammarCompiler | ValueError
        try:
            self._compiler = GrammarCompiler(self._tokenizer, int(setup["vocab_size"]))
        except ValueError as error:  # texts can still be tokenized
            self._compiler = error

    def encode(self, texts: list[str], add_special_tokens: bool, plain: bool) -> list[list[int]]:
        """Token ids of each text."""
        return [self._tokenizer.encode(text, add_special_tokens, plain) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def prompt(self, rendering: Mapping[str, Any], max_characters: int) -> str:
        """The prompt of a conversation, given as the document of a `Rendering`."""
        try:
            chat = Rendering.of_document(rendering)
            text = self._tokenizer.prompt(chat)
        except RecursionError:
            raise ValueError("a value is nested too deeply; expected fewer levels") from None
        return text if chat.form is not None else _within(text, max_characters)

    def chat(
        self,
        messages: list[Any],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        options: Mapping[str, Any],
        max_characters: int,
    ) -> str:
        """The prompt of messages in OpenAI's form, by the model's own template."""
        text = self._tokenizer.render_chat(messages, tools, add_generation_prompt, **options)
        return _within(text, max_characters)

    def habits(self) -> dict[str, Any]:
        """What the chat template expects of messages: fields of Habits."""
        return asdict(self._tokenizer.habits())

    def grammar(self, constraint: Mapping[str, Any]) -> str:
        """The grammar of a constraint, compiled and tried."""

        if isinstance(self._compiler, ValueError):
            raise self._compiler
        return examine(self._compiler, StructuredOutputsParams(**constraint))


def _within(prompt: str, most: int) -> str:
    if len(prompt) > most:
        why = f"messages: the chat template makes {len(prompt)} characters of them; expected at most {most}"
        raise ValueError(why)
    return prompt


def main() -> None:
    """Fork and end workers for one parent until it closes the socket; then end them all.

    Each request and each answer is one document: "fork", with the worker's socket -> its pid; a pid -> [the
    signal that ended the worker or 0, its CPU seconds].
    """
    process.leave_to_parent()
    control = socket.socket(fileno=int(sys.argv[1]))
    try:
        jobs = Jobs(receive(control))
    except Exception as error:  # otherwise only its absence would be seen, not the cause
        send(control, f"{type(error).__name__}: {error}")
        sys.exit(1)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    gc.freeze()  # a collection would write to, and so copy, every page that workers share
    workers: set[int] = set()
    answer: Any = READY
    with contextlib.suppress(EOFError, OSError):
        while True:
            send(control, answer)
            request, descriptor = receive_with_descriptor(control)
            if descriptor is None:
                workers.discard(request)
                answer = _end(request)
                continue
            answer = os.fork()
            if not answer:
                control.close()
                _work(jobs, socket.socket(fileno=descriptor))
            os.close(descriptor)
            workers.add(answer)
    for worker in workers:
        _end(worker)


def _end(worker: int) -> tuple[int, float]:
    os.kill(worker, signal.SIGKILL)  # has no effect on one that has ended
    _, status, usage = os.wait4(worker, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, usage.ru_utime + usage.ru_stime


def _work(jobs: Jobs, connection: socket.socket) -> NoReturn:
    """Run jobs until the parent closes the socket."""
    try:
        resource.setrlimit(resource.RLIMIT_STACK, (_stack() + _STACK_BYTES,) * 2)
        while True:
            name, arguments, seconds, memory = receive(connection)
            _limit(seconds, memory)
            before, began = _peak(), time.process_time()
            answer = _answer(partial(getattr(jobs, name), **arguments))
            answer["seconds"] = time.process_time() - began
            answer["retire"] = _peak() - before > _RETIRE_BYTES
            send(connection, answer)
    except BaseException:
        os._exit(1)  # never return into the server's loop


def _answer(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": call()}
    except ValueError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"failed": "it takes more memory than one input may; expected a shorter or simpler one"}
    except Exception as error:  # of a library or a template
        return {"failed": f"{type(error).__name__}: {error}"}


def _limit(seconds: float, memory: int) -> None:
    """Limits CPU time and address space of one job. The kernel enforces both, whatever native code does."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _soft(resource.RLIMIT_CPU, ceil(usage.ru_utime + usage.ru_stime + seconds))
    with contextlib.suppress(OSError):  # no /proc: not Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _soft(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)


def _soft(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _stack() -> int:
    """Bytes of the stack in use."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmStk:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
