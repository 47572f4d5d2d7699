"""The child process: reads jobs from its socket, runs them under limits, answers.

It imports no torch. Each job runs in a thread with a small stack: what fits there fits many times over
in the stacks of the engine's process, which repeats an accepted grammar's compilation.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from farthing.engine.request import StructuredOutputsParams
from farthing.engine.sandbox import frames
from farthing.engine.tokenizer import Tokenizer

_STACK_BYTES = 1 << 20
_MEMORY_BYTES = 1 << 30  # a job may add
_RETIRE_BYTES = 256 << 20  # after a job that added this much, the process is replaced


class Jobs:
    """What a child can do, by name."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._tokenizer = Tokenizer.from_state(setup["tokenizer"])
        self._vocab = int(setup["vocab_size"])
        self._compiler: Any = None

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        return [self._tokenizer.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def chat(self, conversation: Mapping[str, Any], max_characters: int) -> str:
        """The prompt of a conversation."""
        text = self._tokenizer.render_chat(**conversation)
        if len(text) > max_characters:
            raise ValueError(
                f"messages: the chat template makes {len(text)} characters of them; "
                f"expected at most {max_characters}"
            )
        return text

    def grammar(self, constraint: Mapping[str, Any]) -> str:
        """The grammar of a constraint, compiled and tried."""
        from farthing.engine.structured import GrammarCompiler, examine

        if self._compiler is None:
            self._compiler = GrammarCompiler(self._tokenizer, self._vocab)
        return examine(self._compiler, StructuredOutputsParams(**constraint))


def main() -> None:
    """Serve one parent until it closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    connection = socket.socket(fileno=int(sys.argv[1]))
    setup = frames.receive(connection)
    with contextlib.suppress(OSError):
        os.nice(setup["niceness"])
    jobs = Jobs(setup)
    del setup
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    frames.send(connection, {"ready": True})
    while True:
        try:
            name, arguments, seconds = frames.receive(connection)
        except (EOFError, OSError):
            return
        _limit(seconds)
        before = _peak()
        answer = _in_thread(partial(getattr(jobs, name), **arguments))
        answer["retire"] = _peak() - before > _RETIRE_BYTES
        frames.send(connection, answer)


def _in_thread(call: Callable[[], Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}

    def run() -> None:
        try:
            answer["result"] = call()
        except MemoryError:
            answer["refused"] = "needs more memory than an input may take"
        except (ValueError, RecursionError) as error:
            answer["refused"] = str(error)

    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return answer or {"refused": "could not be checked"}


def _limit(seconds: float) -> None:
    """CPU time and address space for one job: a second line behind the parent's deadline."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _soft(resource.RLIMIT_CPU, ceil(usage.ru_utime + usage.ru_stime + seconds) + 1)
    with contextlib.suppress(OSError):  # no /proc: not Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _soft(resource.RLIMIT_AS, pages * resource.getpagesize() + _MEMORY_BYTES)


def _soft(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
