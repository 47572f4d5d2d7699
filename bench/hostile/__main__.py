"""Measures how much one hostile client delays others: every known attack next to well-behaved clients.

    python -m bench.hostile [--rounds 3] [--seconds 3] [--only NAME] [--model mite] [--gateway] [--json FILE]
    python -m bench.hostile --dialect llama.cpp --command "llama-server -m FILE.gguf --port {port}"

Starts `farthing serve` with two API keys. Two well-behaved clients share a key and send requests
continuously, one for 8 tokens and one for an answer under a new grammar. With --gateway, all requests pass a
gateway. Windows with the attack, which uses the other key, alternate with windows without it (control). An
attack's added latency is the difference of the worst latencies. The exit code is 1 if an attack adds more
than 250 ms or makes a well-behaved request fail. The attacker runs in a separate process with SCHED_IDLE,
since a real one has its own machine; at niceness 19 it would keep a core for milliseconds. `held` is the
longest time that the event loop and an engine step took at once, measured in the server. With --command it
attacks another server, started by that command, beside one well-behaved client that asks for 8 tokens. A
summary by class of attack follows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from bench.hostile.attacks import BAD, CLASSES, NUMBERS, SPOKEN, Attack, attacks, url
from bench.hostile.peer import DIALECTS, Peer, spoken
from bench.hostile.processes import free_port, resident

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

    @property
    def worst(self) -> float:
        """The longest latency."""
        return max(self.seconds, default=0.0)

    @property
    def median(self) -> float:
        """The median latency."""
        return median(self.seconds) if self.seconds else 0.0


@dataclass(slots=True)
class Result:
    """One attack: latencies by kind of client, with and without it, and the longest holds."""

    name: str
    during: dict[str, Latencies]
    alone: dict[str, Latencies]
    answers: str = ""
    held: dict[str, float] = field(default_factory=dict)  # with the attack
    held_alone: dict[str, float] = field(default_factory=dict)
    ended: bool = False  # the server was no longer there, or no longer answered
    memory: int = 0  # bytes afterwards

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
        return {
            "ok": self.ok,
            "failures": self.failures,
            "answers": self.answers,
            "ended": self.ended,
            "memory": self.memory,
            "held": self.held,
            "held_alone": self.held_alone,
        } | {
            kind: {
                "added": self.added(kind),
                "worst": self.during[kind].worst,
                "median": self.during[kind].median,
                "alone_worst": self.alone[kind].worst,
                "alone_median": self.alone[kind].median,
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


class Server:
    """`farthing serve` with measurements inside the process."""

    def __init__(self, model: str, folder: Path) -> None:
        self.port = self.entry = free_port()  # entry: where clients connect
        self._gateway: subprocess.Popen[bytes] | None = None
        self._file = folder / "holds.json"
        keys = ["--api-key", f"good:{GOOD}", "--api-key", f"bad:{BAD}"]
        command = [sys.executable, "-m", "bench.hostile.serve", str(self._file), "serve", model]
        self._process = subprocess.Popen([*command, "--port", str(self.port), *keys])

    def wait(self) -> None:
        """Wait until the server is ready. Raises SystemExit."""
        deadline = time.monotonic() + 300
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(*ERRORS):
                if httpx.get(f"{url(self.port)}/ready").status_code == 200:
                    return
            time.sleep(0.1)
        raise SystemExit("the server did not start")

    def put_gateway_in_front(self) -> None:
        """Let clients connect to a gateway instead."""
        self.entry = free_port()
        command = [sys.executable, "-m", "farthing", "fleet", "gateway", "--port", str(self.entry)]
        self._gateway = subprocess.Popen([*command, "--replica", url(self.port)])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(*ERRORS):
                if httpx.get(f"{url(self.entry)}/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise SystemExit("the gateway did not start")

    def holds(self) -> dict[str, float]:
        """The longest holds since the last call."""
        self._file.unlink(missing_ok=True)
        os.kill(self._process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while not self._file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        held: dict[str, float] = json.loads(self._file.read_text()) if self._file.exists() else {}
        return held

    def memory(self) -> int:
        """Resident bytes, with children."""
        return resident(self._process.pid)

    def revive(self) -> bool:
        """Whether an attack has ended it; it is not started again."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Stop the server and the gateway."""
        if self._gateway is not None:
            self._gateway.terminate()
            self._gateway.wait(60)
        self._process.terminate()
        self._process.wait(60)


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
            case _:
                break
    print(dict(answers), flush=True)
    os._exit(0)


def measure(port: int, into: dict[str, Latencies], seconds: float) -> None:
    """Run the well-behaved clients for a while."""
    deadline = time.monotonic() + seconds

    def ask(kind: str) -> None:
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

    clients = [threading.Thread(target=ask, args=(kind,)) for kind in into]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def run(server: Server | Peer, attack: Attack, options: argparse.Namespace) -> Result:
    """Alternate windows without and with the attack."""
    kinds = ["plain"] if options.command else list(KINDS)
    result = Result(attack.name, {k: Latencies() for k in kinds}, {k: Latencies() for k in kinds})
    attacker = Attacker(server.entry, attack.name, options.dialect)
    server.holds()
    for _ in range(options.rounds):
        measure(server.entry, result.alone, options.seconds)
        keep_most(result.held_alone, server.holds())
        attacker.say("begin")
        measure(server.entry, result.during, options.seconds)
        attacker.say("pause")
        keep_most(result.held, server.holds())
        time.sleep(SETTLE)
        wait_idle(server.port)
        server.holds()
    result.answers = attacker.end()
    result.memory, result.ended = server.memory(), server.revive()
    return result


def wait_idle(port: int) -> None:
    """Wait up to 30 s until the engine has finished the attack's work, since the next window is a control."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(*ERRORS):
            lines = httpx.get(f"{url(port)}/metrics", timeout=30).text.splitlines()
            names = ("vllm:num_requests_", "farthing:num_requests_")
            busy = [line for line in lines if line.startswith(names)]
            if not busy:  # another server: it is idle if it answers as fast as ever
                began = time.monotonic()
                httpx.post(f"{url(port)}/v1/completions", json=PLAIN, timeout=30)
                if time.monotonic() - began < 2 * SETTLE:
                    return
            elif all(float(line.rsplit(" ", 1)[1]) == 0 for line in busy):
                return
        time.sleep(0.2)


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
    held = " ".join(
        f"{1e3 * result.held.get(name, 0.0):6.0f}"
        for name in ("loop cpu", "loop wall", "step cpu", "step wall")
    )
    verdict = "  the server ended" if result.ended else "" if result.ok else "  over the limit"
    print(f"{result.name:36} {cells} {held} {result.failures:6d}{verdict}", flush=True)


HEAD = (
    f"{'':36} {'8 tokens':>20} {'new grammar':>20} {'held at once':>27}\n"
    f"{'attack (ms)':36} " + "  worst  alone  added" * 2 + "   loop   wall   step   wall failed"
)


def run_all(server: Server | Peer, options: argparse.Namespace) -> tuple[list[Result], int, int]:
    """The results of all chosen attacks, and the memory before the first and after the last."""
    server.wait()
    if options.gateway and isinstance(server, Server):
        server.put_gateway_in_front()
    kinds = ["plain"] if options.command else list(KINDS)
    measure(server.entry, {kind: Latencies() for kind in kinds}, 3.0)
    before, results = server.memory(), []
    print(HEAD)
    for attack in attacks(options.only):
        results.append(run(server, attack, options))
        print_result(results[-1])
        if results[-1].ended and isinstance(server, Server):
            break
    return results, before, server.memory()


def summarize(results: list[Result]) -> None:
    """Print a line for each class of attacks: what they added to eight tokens, and what ended the server."""
    for name, made in CLASSES.items():
        names = {attack.name for attack in made()}
        some = [result for result in results if result.name in names]
        if some:
            added = sorted(result.added("plain") for result in some)
            failed, ended = sum(r.failures for r in some), sum(r.ended for r in some)
            print(
                f"{name}: {len(some)} attacks, 8 tokens later by {median(added):.2f} s in the median, "
                f"{added[-1]:.2f} at most; {failed} requests failed; the server ended in {ended}; "
                f"at most {max(r.memory for r in some) / 2**20:,.0f} MiB"
            )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="bench.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="windows with and without each attack")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per window")
    parser.add_argument("--only", default="", help="only attacks whose name contains this text")
    parser.add_argument("--model", default="mite")
    parser.add_argument("--gateway", action="store_true", help="put a gateway in front of the server")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--command", help="start this server instead, on the port {port}")
    parser.add_argument("--dialect", choices=DIALECTS, default="farthing", help="how it spells a grammar")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        SPOKEN[0] = partial(spoken, dialect=options.dialect)
        attack_here(next(each for each in attacks() if each.name == options.attack), options.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # also stops the server
    with tempfile.TemporaryDirectory() as folder:
        server = (
            Peer(options.command, Path(folder) / "log")
            if options.command
            else Server(options.model, Path(folder))
        )
        try:
            results, before, after = run_all(server, options)
        finally:
            server.stop()
    print(f"memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB")
    over = [result.name for result in results if not result.ok]
    print(f"{len(results) - len(over)} of {len(results)} attacks within {1e3 * BAR:.0f} ms")
    summarize(results)
    if options.json:
        figures = {"bar": BAR, "memory": [before, after], "attacks": {r.name: r.to_json() for r in results}}
        options.json.write_text(json.dumps(figures, indent=1))
    raise SystemExit(1 if over else 0)


if __name__ == "__main__":
    main()
