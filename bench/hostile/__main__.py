"""Measures how much one hostile client delays others: every known attack next to well-behaved clients.

    python -m bench.hostile [--rounds 3] [--seconds 3] [--only NAME] [--model mite] [--gateway] [--json FILE]
    python -m bench.hostile --dialect llama.cpp --command "llama-server -m FILE.gguf --metrics --port {port}"

Starts `farthing serve` with two API keys. Two well-behaved clients share a key and send requests
continuously, one for 8 tokens and one for an answer under a new grammar. With --gateway, all requests pass a
gateway. Windows with the attack, which uses the other key, alternate with windows without it (control). An
attack's added latency is the difference of the worst latencies. The exit code is 1 if an attack adds more
than 250 ms or makes a well-behaved request fail. The attacker runs in a separate process with SCHED_IDLE,
since a real one has its own machine; at niceness 19 it would keep a core for milliseconds. `held` is the
longest time that the event loop and an engine step took at once, measured in the server.

--command attacks another server, which that command starts, beside one client that asks for 8 tokens. One
that ended, or does not answer for a minute, is started again. A table by class follows, with the median over
rounds of what an attack added. What still busies a server in the next control is only in the worst request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from bench.harness import FARTHING, answers, free_port, holds_within, percentile, resident, running, show
from bench.hostile.attacks import BAD, CLASSES, DIALECTS, NUMBERS, SPOKEN, Attack, attacks, release, url

BAR = 0.250  # seconds that an attack may add
GOOD = "sk-good"
ERRORS = (httpx.HTTPError, OSError)
SETTLE = 0.5  # seconds to skip after an attack
PLAIN = {"prompt": "def f(x):", "max_tokens": 8, "ignore_eos": True}


@dataclass(slots=True)
class Latencies:
    """Latencies of well-behaved requests, in seconds."""

    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    windows: list[float] = field(default_factory=list)  # the longest of each

    @property
    def worst(self) -> float:
        """The longest latency."""
        return max(self.seconds, default=0.0)


@dataclass(slots=True)
class Result:
    """One attack: latencies by kind of client, with and without it, and the longest holds."""

    name: str
    during: dict[str, Latencies]
    alone: dict[str, Latencies]
    answers: str = ""
    held: dict[str, float] = field(default_factory=dict)  # with the attack
    ended: bool = False  # the server exited, or no longer answered
    memory: int = 0  # bytes afterwards

    def typical(self, kind: str) -> float:
        """Seconds that the attack added to the worst latency of a round, the median of the rounds."""
        rounds = zip(self.during[kind].windows, self.alone[kind].windows, strict=True)
        return max(0.0, statistics.median(during - alone for during, alone in rounds))

    def added(self, kind: str) -> float:
        """Seconds that the attack added to the worst latency."""
        return max(0.0, self.during[kind].worst - self.alone[kind].worst)

    @property
    def failures(self) -> int:
        """Well-behaved requests that failed during the attack."""
        return sum(each.failures.total() for each in self.during.values())

    @property
    def ok(self) -> bool:
        """Whether the attack stays within the limit."""
        return not (self.failures or self.ended) and all(self.added(kind) <= BAR for kind in self.during)

    def to_json(self) -> dict[str, Any]:
        """The result for --json; times in seconds."""
        own = {"ok": self.ok, "failures": self.failures, "answers": self.answers, "held": self.held}
        own |= {"ended": self.ended, "memory": self.memory}
        return own | {
            kind: {
                "added": self.added(kind),
                "typical": self.typical(kind),
                "worst": self.during[kind].worst,
                "median": percentile(self.during[kind].seconds, 0.5),
                "alone_worst": self.alone[kind].worst,
                "requests": len(self.during[kind].seconds),
            }
            for kind in self.during
        }


def plain() -> dict[str, Any]:
    """A request for eight tokens."""
    return PLAIN


def under_grammar() -> dict[str, Any]:
    """A request with a choice grammar that is new to the server."""
    number = next(NUMBERS)
    return {"prompt": "x", "max_tokens": 12, "guided_choice": [f"red {number}", f"green {number}"]}


KINDS: dict[str, Callable[[], dict[str, Any]]] = {"plain": plain, "grammar": under_grammar}


def kinds(options: argparse.Namespace) -> list[str]:
    """The well-behaved clients: beside another server only one."""
    return ["plain"] if options.command else list(KINDS)


@dataclass(slots=True)
class Server:
    """A server on a port of its own or behind a gateway; `farthing serve` measures itself into a file."""

    process: subprocess.Popen[bytes]
    port: int
    entry: int  # where clients connect
    file: Path | None = None

    def holds(self) -> dict[str, float]:
        """The longest holds since the last call; of another server, nothing."""
        if self.file is None:
            return {}
        self.file.unlink(missing_ok=True)
        os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while not self.file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        held: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}
        return held


@contextlib.contextmanager
def served(options: argparse.Namespace) -> Iterator[Server]:
    """A server that is ready and warm, and stopped at the end."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        port, file = free_port(), Path(folder) / "holds.json"
        if options.command:
            log, command = Path(folder) / "log", shlex.split(options.command.replace("{port}", str(port)))
            output = {"stdout": stack.enter_context(log.open("wb")), "stderr": subprocess.STDOUT}
            up = answers(port, DIALECTS[options.dialect])
            other = running(command, up, 600, **output)
            server = Server(stack.enter_context(other), port, port)
        else:
            keys = ["--api-key", f"good:{GOOD}", "--api-key", f"bad:{BAD}"]
            own = [sys.executable, "-m", "bench.hostile.serve", file, "serve", options.model, *keys]
            process = running([*own, "--port", port], answers(port), 300)
            server = Server(stack.enter_context(process), port, port, file)
        if options.gateway:
            server.entry = free_port()
            gateway = [*FARTHING, "fleet", "gateway", "--port", server.entry, "--replica", url(port)]
            stack.enter_context(running(gateway, answers(server.entry, "/health")))
        measure(server.entry, {kind: Latencies() for kind in kinds(options)}, 3.0)
        yield server


class Attacker:
    """A process that attacks between `begin` and `pause`."""

    def __init__(self, port: int, name: str, dialect: str) -> None:
        command = [sys.executable, "-m", "bench.hostile", "--attack", name, "--port", str(port)]
        command += ["--dialect", dialect]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has started

    def say(self, word: str) -> None:
        """Send `begin`, `pause` or `end`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """Stop the attacker. Returns its responses with their counts."""
        self.say("end")
        return self._process.communicate()[0].strip()


def attack_here(attack: Attack, port: int) -> None:
    """The attacker process: reads commands from standard input."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    answers: Counter[str] = Counter()
    running = threading.Event()

    def harm() -> None:
        while True:
            running.wait()
            try:
                answers[attack.once(port)] += 1
            except ERRORS as error:
                answers[type(error).__name__] += 1

    for _ in range(attack.threads):
        threading.Thread(target=harm, daemon=True).start()
    print("started", flush=True)
    for line in sys.stdin:
        match line.strip():
            case "begin":
                running.set()
            case "pause":
                running.clear()
                release()
            case _:
                break
    print(dict(answers), flush=True)
    os._exit(0)


def measure(port: int, into: dict[str, Latencies], seconds: float) -> None:
    """Run the well-behaved clients for a while."""
    deadline = time.monotonic() + seconds

    def ask(kind: str) -> None:
        first = len(into[kind].seconds)
        with httpx.Client(base_url=url(port), headers={"authorization": f"Bearer {GOOD}"}) as client:
            while time.monotonic() < deadline:
                began = time.monotonic()
                try:
                    status = str(client.post("/v1/completions", json=KINDS[kind](), timeout=30).status_code)
                except ERRORS as error:
                    status = type(error).__name__
                into[kind].seconds.append(time.monotonic() - began)
                if status != "200":
                    into[kind].failures[status] += 1
                time.sleep(0.02)
        into[kind].windows.append(max(into[kind].seconds[first:]))

    clients = [threading.Thread(target=ask, args=(kind,)) for kind in into]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def run(server: Server, attack: Attack, options: argparse.Namespace) -> Result:
    """Alternate windows without and with the attack."""
    during, alone = ({kind: Latencies() for kind in kinds(options)} for _ in range(2))
    result = Result(attack.name, during, alone)
    attacker = Attacker(server.entry, attack.name, options.dialect)
    for _ in range(options.rounds):
        measure(server.entry, result.alone, options.seconds)
        server.holds()
        attacker.say("begin")
        measure(server.entry, result.during, options.seconds)
        attacker.say("pause")
        keep_most(result.held, server.holds())
        time.sleep(SETTLE)
        wait_idle(server.port)
    result.answers, result.memory = attacker.end(), resident(server.process.pid)
    result.ended = not holds_within(answers(server.port, "/health"), server.process, 60)
    return result


def run_all(options: argparse.Namespace) -> Iterator[Result]:
    """The results of the chosen attacks. A server that one of them has ended is started again."""
    waiting, ended = attacks(options.only), True
    while waiting and ended:
        with served(options) as server:
            print(f"memory: {resident(server.process.pid) / 2**20:.0f} MiB")
            ended = False
            while waiting and not ended:
                result = run(server, waiting.pop(0), options)
                ended = result.ended
                yield result


def wait_idle(port: int) -> None:
    """Wait up to 30 s until the engine has finished the attack's work, since the next window is a control."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(*ERRORS):
            lines = httpx.get(f"{url(port)}/metrics", timeout=30).text.splitlines()
            busy = [line for line in lines if line.startswith(_RUNNING)]
            if all(float(line.rsplit(" ", 1)[1]) == 0 for line in busy):
                return
        time.sleep(0.2)


_RUNNING = ("farthing:num_requests_", "vllm:num_requests_", "llamacpp:requests_")


def keep_most(into: dict[str, float], new: dict[str, float]) -> None:
    """Keep the larger value of each."""
    for name, seconds in new.items():
        into[name] = max(into.get(name, 0.0), seconds)


def print_result(result: Result) -> None:
    """Print one line: the added latency of each kind, the control, and the longest holds."""
    cells = " ".join(
        f"{1e3 * value:6.0f}"
        for kind in result.during
        for value in (result.during[kind].worst, result.alone[kind].worst, result.added(kind))
    )
    names = ("loop cpu", "loop wall", "step cpu", "step wall")
    held = " ".join(f"{1e3 * result.held.get(name, 0.0):6.0f}" for name in names)
    verdict = "" if result.ok else "  the server ended" if result.ended else "  over the limit"
    print(f"{result.name:36} {cells} {held} {result.failures:6d}{verdict}", flush=True)


HEAD = (
    f"{'':36} {'8 tokens':>20} {'new grammar':>20} {'held at once':>27}\n"
    f"{'attack (ms)':36} " + "  worst  alone  added" * 2 + "   loop   wall   step   wall failed"
)


def summary(results: list[Result]) -> Iterator[list[object]]:
    """A row for each class of attacks."""
    for name, made in CLASSES.items():
        names = {attack.name for attack in made()}
        some = [result for result in results if result.name in names]
        if some:
            added = statistics.median(result.typical("plain") for result in some)
            worst = max(result.during["plain"].worst for result in some)
            failed, ended = sum(r.failures for r in some), sum(r.ended for r in some)
            most = max(r.memory for r in some) / 2**20
            yield [name, len(some), added, worst, failed, ended, most]


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="windows with and without each attack")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per window")
    parser.add_argument("--only", default="", help="only attacks whose name contains this text, or a class")
    parser.add_argument("--model", default="mite")
    parser.add_argument("--gateway", action="store_true", help="put a gateway in front of the server")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--command", help="start this server instead, on the port {port}")
    parser.add_argument("--dialect", choices=DIALECTS, default="farthing", help="how it spells a grammar")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run and print."""
    options = parsed()
    SPOKEN[0] = options.dialect
    if options.attack:
        attack_here(next(each for each in attacks() if each.name == options.attack), options.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # also stops the server
    print(HEAD)
    results: list[Result] = []
    for result in run_all(options):
        results.append(result)
        print_result(result)
    headings = ("", "attacks", "added to 8 tokens, s", "worst, s", "failed", "ended", "memory, MiB")
    show("by class", headings, list(summary(results)))
    over = [result.name for result in results if not result.ok]
    print(f"{len(results) - len(over)} of {len(results)} attacks within {1e3 * BAR:.0f} ms")
    if options.json:
        figures = {"bar": BAR, "attacks": {result.name: result.to_json() for result in results}}
        options.json.write_text(json.dumps(figures, indent=1))
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
