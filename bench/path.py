"""The path of a chat: which files and functions of ours one streamed chat without tools runs.

A child serves the model with one thread and records every Python function that is called between a request
and the end of its answer. Functions that only happen to run meanwhile, such as the dashboard's sampling, are
left out: a function counts if each of three chats runs it. The first chat of the process, which fills caches,
is not recorded. All of them use one connection, as clients do.

    python bench/path.py [MODEL] [--tokens 12] [--tree]
"""

from __future__ import annotations

import argparse
import dis
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

RECORDED = 3  # chats
_NESTED = re.compile(r"(\.<locals>)?\.<\w+>")  # a comprehension or a lambda
_SETTLED = 0.05  # seconds after an answer's end in which the server has released what it held

Function = tuple[str, str]  # file below src, qualified name


def trace(model: str = "mite", tokens: int = 12) -> set[Function]:
    """The functions that every recorded chat runs."""
    command = [sys.executable, __file__, model, "--tokens", str(tokens), "--child"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if answer.returncode:
        raise RuntimeError(f"the traced server failed: {answer.stderr[-2000:]}")
    return {(file, name) for file, name in json.loads(answer.stdout.splitlines()[-1])}


class Recorder:
    """A profile function for every thread of the process that notes calls of our functions."""

    def __init__(self, source: Path) -> None:
        self._source = f"{source}{os.sep}"
        self.codes: set[Any] | None = None  # None: not recording

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Note a call."""
        if event == "call" and (codes := self.codes) is not None:
            codes.add((frame.f_code, frame.f_lasti))

    def functions(self, codes: set[Any]) -> set[Function]:
        """Our functions among the calls; comprehensions and lambdas belong to what contains them."""
        return {
            (code.co_filename.removeprefix(self._source), _NESTED.sub("", code.co_qualname))
            for code, at in codes
            if code.co_filename.startswith(self._source) and not code.co_qualname.startswith("<")
            if at <= _entry(code)
        }


@cache
def _entry(code: CodeType) -> int:
    """Where a call begins. A coroutine that is resumed later was called earlier."""
    return next(step.offset for step in dis.get_instructions(code) if step.opname == "RESUME")


def child(model: str, tokens: int) -> None:
    """Serve, chat and print the functions; runs until the server has shut down."""
    import farthing

    recorder = Recorder(Path(farthing.__file__).parents[1])
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    from farthing.config import EngineConfig
    from farthing.engine.build import build_engine
    from farthing.server import run
    from farthing.server.config import ServerConfig

    listener = run.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    found: list[set[Function]] = []

    def client() -> None:
        sys.setprofile(None)
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            _wait_until_ready(connection)
            for number in range(1 + RECORDED):
                recorder.codes = codes = set[Any]()
                _chat(connection, number, tokens)
                time.sleep(_SETTLED)
                recorder.codes = None
                if number:
                    found.append(recorder.functions(codes))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=client).start()
    run.listen = lambda host, port: listener  # the address is known before the server runs
    config = ServerConfig(host="127.0.0.1", port=port)
    run.serve(config, model, lambda _: build_engine(EngineConfig(model=model, threads=1)))
    print(json.dumps(sorted(set.intersection(*found))))


def _wait_until_ready(connection: http.client.HTTPConnection) -> None:
    for _ in range(1200):
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        answer.read()
        if answer.status == 200:
            return
        time.sleep(0.1)
    raise TimeoutError("the server was not ready within two minutes")


def _chat(connection: http.client.HTTPConnection, number: int, tokens: int) -> None:
    body = {
        "messages": [{"role": "user", "content": f"Write function number {number}."}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse().read()
    if b"data: [DONE]" not in answer:
        raise RuntimeError(f"the answer did not end: {answer[-500:]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The path of a chat.")
    parser.add_argument("model", nargs="?", default="mite")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--tree", action="store_true", help="every function, by file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.model, arguments.tokens)
        return
    by_file = defaultdict(list)
    for file, name in sorted(trace(arguments.model, arguments.tokens)):
        by_file[file].append(name)
    for file, names in by_file.items():
        print(f"{len(names):4} {file}")
        if arguments.tree:
            print(*(f"       {name}" for name in names), sep="\n")
    print(f"{sum(map(len, by_file.values()))} functions in {len(by_file)} files")


if __name__ == "__main__":
    main()
