"""How much one hostile client delays another: every known attack next to a well-behaved client.

    python bench/hostile.py [--seconds 6] [--only NAME] [--model mite] [--json FILE]

Starts `farthing serve` with two API keys. The well-behaved client asks for 8 tokens again and again; its
worst latency is taken during each attack, and alone (control) before and after it. What an attack adds is
judged against its control: on a shared machine both move. Attacks run in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

BAR = 0.250  # seconds that an attack may add
GOOD, BAD = "sk-good", "sk-bad"
JSON = {"content-type": "application/json", "authorization": f"Bearer {BAD}"}
ERRORS = (httpx.HTTPError, OSError)


@dataclass(slots=True)
class Server:
    """A running `farthing serve`."""

    port: int
    process: subprocess.Popen[bytes] | None = None  # None: of another process

    @property
    def url(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def memory(self) -> int:
        """Resident bytes of the server, without its children."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096


@dataclass(slots=True)
class Attack:
    """An attack: runs in each of `threads` loops until stopped."""

    name: str
    once: Callable[[Server], str]  # what came back
    threads: int = 4


@dataclass(slots=True)
class Outcome:
    """The well-behaved client's latencies during one attack, in seconds."""

    name: str
    latencies: list[float] = field(default_factory=list)
    failures: int = 0

    @property
    def worst(self) -> float:
        """The slowest response."""
        return max(self.latencies, default=float("inf"))

    @property
    def median(self) -> float:
        """The median response."""
        return median(self.latencies) if self.latencies else float("inf")


@contextlib.contextmanager
def serving(model: str) -> Iterator[Server]:
    """A server on a free port, stopped at the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code = "from farthing.cli.app import main; main()"
    keys = ["--api-key", f"good:{GOOD}", "--api-key", f"bad:{BAD}"]
    process = subprocess.Popen([sys.executable, "-c", code, "serve", model, "--port", str(port), *keys])
    server = Server(port, process)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(*ERRORS):
                if httpx.get(f"{server.url}/ready").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def post(path: str, document: Any, timeout: float = 60.0) -> Callable[[Server], str]:
    """An attack by one body."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()

    def once(server: Server) -> str:
        return str(httpx.post(server.url + path, content=body, headers=JSON, timeout=timeout).status_code)

    return once


def constrained(**fields: Any) -> Callable[[Server], str]:
    """A completion with a hostile grammar, different each time to avoid cache hits."""
    numbers = iter(range(10**9))

    def once(server: Server) -> str:
        document = {"prompt": "x", "max_tokens": 4, **fields}
        name = next(name for name in fields if name.startswith("guided"))
        if isinstance(document[name], dict):
            document[name] = document[name] | {"title": f"{next(numbers)}"}
        elif name == "guided_regex":
            document[name] += "y" * (next(numbers) % 50)
        else:
            document[name] += f'\nother{next(numbers)}: "y"'
        answer = httpx.post(f"{server.url}/v1/completions", json=document, headers=JSON, timeout=60)
        return str(answer.status_code)

    return once


def long_head(server: Server) -> str:
    """150 MB of one header."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ")
        for _ in range(150):
            connection.sendall(b"y" * 1_000_000)
        return connection.recv(100).split(b"\r\n")[0].decode()


def half_open(server: Server) -> str:
    """500 sockets per loop that send the start of a request; the last 3,000 stay open."""
    for _ in range(500):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        connection.sendall(b"GET /health HTT")
        _HELD.append(connection)
    while len(_HELD) > 3000:
        _HELD.pop(0).close()
    return "held"


_HELD: list[socket.socket] = []


def slow_body(server: Server) -> str:
    """A body sent one byte at a time."""
    head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {BAD}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        for _ in range(10):
            connection.sendall(b"x")
            time.sleep(0.1)
    return "left"


def nested(count: int) -> dict[str, Any]:
    """Schemas within schemas."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(count):
        schema = {"allOf": [schema]}
    return schema


def chained(count: int) -> dict[str, Any]:
    """Definitions that refer to each other."""
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{count}": {"type": "string"}}}


def attacks() -> list[Attack]:
    """All attacks found by the audit of November 2026, and variants."""
    user = {"role": "user", "content": "x"}
    long_text = "a b " * 1_975_000
    rules = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3500)) + '\nr3500: "x"'
    crowd = {"prompt": ["x" * 200] * 8, "n": 60, "max_tokens": 1500, "ignore_eos": True}
    chat, complete = "/v1/chat/completions", "/v1/completions"
    return [
        Attack("schema: 3,000 chained $ref", constrained(guided_json=chained(3000))),
        Attack("schema: 2,000 nested allOf", constrained(guided_json=nested(490))),
        Attack("schema: multipleOf", constrained(guided_json={"type": "integer", "multipleOf": 999_983})),
        Attack("grammar: 3,500 Lark rules", constrained(guided_grammar=rules)),
        Attack("regex: (x{1000}){1000}", constrained(guided_regex="(x{1000}){1000}")),
        Attack("prompt: 7.9 MB", post(complete, {"prompt": long_text})),
        Attack("chat: 7.9 MB", post(chat, {"messages": [user | {"content": long_text}]})),
        Attack("tokenize: 7.9 MB", post("/tokenize", {"prompt": long_text})),
        Attack("tokenize: 100 kB", post("/tokenize", {"prompt": "a b " * 25_000})),
        Attack("chat: 200,000 messages", post(chat, {"messages": [user] * 200_000})),
        Attack("chat: 4,000 messages", post(chat, {"messages": [user] * 4_000})),
        Attack(
            "logit_bias: 300,000",
            post(complete, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(300_000)), 1)}),
        ),
        Attack("ids: 200,000 bad", post(complete, {"prompt": [1, -1] * 100_000})),
        Attack("json: 8 MB of [", post(complete, b"[" * 8_000_000)),
        Attack("head: 150 MB", long_head),
        Attack("sockets: 3,000 half-open", half_open, threads=1),
        Attack("bodies: slow", slow_body, threads=50),
        Attack("queue: 480 sequences a request", post(complete, crowd, timeout=3.0), threads=8),
    ]


def attack_in_here(server: Server, attack: Attack, seconds: float) -> Counter[str]:
    """Run an attack's loops in this process; returns the responses."""
    answers: Counter[str] = Counter()
    deadline = time.monotonic() + seconds

    def harm() -> None:
        while time.monotonic() < deadline:
            try:
                answers[attack.once(server)] += 1
            except ERRORS as error:
                answers[type(error).__name__] += 1

    hostile = [threading.Thread(target=harm, daemon=True) for _ in range(attack.threads)]
    for thread in hostile:
        thread.start()
    for thread in hostile:
        thread.join(max(0.0, deadline + 5 - time.monotonic()))
    return answers


@contextlib.contextmanager
def attacking(server: Server, name: str, seconds: float) -> Iterator[list[str]]:
    """Run an attack in its own process, separate from the measuring client."""
    command = [
        sys.executable,
        __file__,
        "--attack",
        name,
        "--port",
        str(server.port),
        "--seconds",
        str(seconds),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    answers: list[str] = []
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    try:
        yield answers
    finally:
        answers.append(process.communicate()[0].strip())


def measure(server: Server, outcome: Outcome, seconds: float) -> None:
    """Run the well-behaved client for a while."""
    deadline = time.monotonic() + seconds
    document = {"prompt": "def f(x):", "max_tokens": 8, "ignore_eos": True}
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {GOOD}"}) as client:
        while time.monotonic() < deadline:
            began = time.monotonic()
            try:
                ok = client.post("/v1/completions", json=document, timeout=60).status_code == 200
            except ERRORS:
                ok = False
            outcome.latencies.append(time.monotonic() - began)
            outcome.failures += not ok
            time.sleep(0.01)


def run(server: Server, attack: Attack, seconds: float) -> tuple[Outcome, Outcome]:
    """(during an attack, alone): the client is measured before, during and after it."""
    during, alone = Outcome(attack.name), Outcome("alone")
    measure(server, alone, seconds / 2)
    with attacking(server, attack.name, seconds) as answers:
        measure(server, during, seconds)
    print(f"{attack.name}: {answers[0]}", file=sys.stderr, flush=True)
    time.sleep(0.5)
    measure(server, alone, seconds / 2)
    return during, alone


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="of each attack")
    parser.add_argument("--only", default="", help="attacks whose name contains this")
    parser.add_argument("--model", default="mite")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        attack = next(each for each in attacks() if each.name == options.attack)
        print("begun", flush=True)
        print(dict(attack_in_here(Server(options.port), attack, options.seconds)))
        return
    results: list[tuple[Outcome, Outcome]] = []
    with serving(options.model) as server:
        measure(server, Outcome("warm-up"), 2.0)
        before = server.memory()
        for attack in attacks():
            if options.only in attack.name:
                results.append(run(server, attack, options.seconds))
        after = server.memory()
    print_table(results)
    print(f"memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB")
    if options.json:
        figures = {
            during.name: {"worst": during.worst, "alone": alone.worst, "failures": during.failures}
            for during, alone in results
        }
        options.json.write_text(json.dumps({"bar": BAR, "attacks": figures}, indent=1))


def print_table(results: list[tuple[Outcome, Outcome]]) -> None:
    """Worst and median latency during each attack, next to those of the control around it."""
    names = ("median", "worst", "alone", "worst", "added")
    print(f"\n{'attack':34} " + " ".join(f"{name:>7}" for name in names) + " failed   (ms)")
    for during, alone in results:
        added = max(0.0, during.worst - alone.worst)
        over = "" if added <= BAR and not during.failures else "  over the bar"
        times = (during.median, during.worst, alone.median, alone.worst, added)
        cells = " ".join(f"{1e3 * seconds:7.0f}" for seconds in times)
        print(f"{during.name:34} {cells} {during.failures:6d}{over}")


if __name__ == "__main__":
    main()
