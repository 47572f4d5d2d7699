"""Serve the same text with one more lever each time; measure speed, memory and cost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from farthing.bench.load import LoadResult, Request, Slo, Target, Timing, complete, run_load, summarize
from farthing.cost.prices import Machine

# Start and stop `farthing` server processes.

READY_TIMEOUT = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    url: str
    pid: int

    def get(self, path: str) -> str:
        """Body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def metric(self, name: str) -> float:
        """Sum of a metric's samples on /metrics; 0 if absent."""
        rows = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, rows))

    def peak_memory(self) -> int:
        """Peak resident set size so far, bytes."""
        return int(_status(self.pid, "VmHWM")) * 1024

    def cpu_seconds(self) -> float:
        """Processor time so far, user and system, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that is currently free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serve(model: str, options: Sequence[str] = ()) -> Iterator[Served]:
    """Start `farthing serve MODEL OPTIONS` on a free port, wait until it is ready, and stop it on exit.

    Raises RuntimeError with the server's last log lines if it does not become ready.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", model, "--port", str(port), *options]
    with running(arguments, url, READY_TIMEOUT, signal.SIGTERM, 15) as process:
        yield Served(url, process.pid)


@contextmanager
def running(
    arguments: list[str], url: str, ready_timeout: float, stop: signal.Signals, stop_timeout: float
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `farthing ARGUMENTS` in a process and wait until `url` is ready. On exit, send the signal `stop`
    and kill the process after stop_timeout seconds.

    Raises RuntimeError with its last log lines if it is not ready within ready_timeout seconds.
    """
    command = [sys.executable, "-m", "farthing.cli.app", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        deadline = time.perf_counter() + ready_timeout
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not ready(url):
                if process.poll() is not None or time.perf_counter() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"`{' '.join(command)}` did not become ready:\n{log.read()[-2000:]}")
                time.sleep(0.02)
            yield process
        finally:
            process.send_signal(stop)
            try:
                process.wait(stop_timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ready(url: str) -> bool:
    """Whether a server accepts requests."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _status(pid: int, field: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return line.split()[1]
    raise RuntimeError(f"/proc/{pid}/status has no {field}")


ANSWER = 96  # tokens per request
ROUNDS = 3
PROMPT_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Lever:
    """A serving configuration: a model and the options that enable a lever."""

    name: str
    model: str
    options: tuple[str, ...] = ()
    quality: str = ""  # perplexity change against the first lever, with interval


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one serving configuration."""

    name: str
    single_tokens_per_second: float  # one user
    batch_tokens_per_second: float  # eight users at once
    ttft_ms: float  # median, eight users
    tpot_ms: float  # median, one user
    memory_bytes: int  # peak resident
    cpu_seconds_per_token: float
    joules_per_token: float  # estimated: CPU seconds × declared watts
    usd_per_million_tokens: float
    quality: str


def prompts(count: int, seed: int = 0) -> list[str]:
    """Beginnings of held-out Python files, cut at a line end."""
    from farthing.compress.api import held_out_sample

    rng = random.Random(seed)
    texts = [json.loads(line)["text"] for line in held_out_sample().read_text(encoding="utf-8").splitlines()]
    out: list[str] = []
    while len(out) < count:
        text = rng.choice(texts)
        start = text.find("\n", rng.randrange(max(1, len(text) - PROMPT_CHARACTERS))) + 1
        out.append(text[start : start + PROMPT_CHARACTERS])
    return out


class Trial:
    """One served lever, measured a round at a time."""

    def __init__(self, lever: Lever, served: Served, users: int) -> None:
        self.lever, self.served, self._users = lever, served, users
        self._target = Target(served.url, json.loads(served.get("/v1/models"))["data"][0]["id"])
        self._single: list[LoadResult] = []
        self._batch: list[LoadResult] = []
        self._cpu_per_token: list[float] = []
        _run(self._target, prompts(2, seed=99), 1)  # warm-up

    def run(self, turn: int) -> None:
        """Serve new prompts: one user, then several at once."""
        cpu, before = self.served.cpu_seconds(), self._generated()
        self._single.append(_run(self._target, prompts(2, seed=10 + turn), 1))
        self._batch.append(_run(self._target, self._many(turn), self._users))
        self._cpu_per_token.append((self.served.cpu_seconds() - cpu) / (self._generated() - before))

    def measured(self, machine: Machine) -> Measured:
        """Medians over the rounds."""
        speed = median(r.output_tokens_per_second for r in self._batch)
        cpu = median(self._cpu_per_token)
        return Measured(
            name=self.lever.name,
            single_tokens_per_second=median(r.output_tokens_per_second for r in self._single),
            batch_tokens_per_second=speed,
            ttft_ms=median(r.ttft_ms["p50"] for r in self._batch),
            tpot_ms=median(r.tpot_ms["p50"] for r in self._single),
            memory_bytes=self.served.peak_memory(),
            cpu_seconds_per_token=cpu,
            joules_per_token=cpu * machine.hardware.watts,  # watts per core
            usd_per_million_tokens=machine.usd_per_second / speed * 1e6,
            quality=self.lever.quality,
        )

    def _generated(self) -> float:
        return self.served.metric("farthing:generation_tokens_total")

    def _many(self, turn: int) -> list[str]:
        return prompts(2 * self._users, seed=20 + turn)


def measure(
    levers: Sequence[Lever], machine: Machine, say: Callable[[str], None], users: int = 8
) -> list[Measured]:
    """Serve every lever in rounds, one after another in each, so that a change in the machine's speed affects
    all of them; idle servers wait without using the processor."""
    rows = []
    with ExitStack() as stack:
        trials = [
            Trial(lever, stack.enter_context(serve(lever.model, lever.options)), users) for lever in levers
        ]
        for turn in range(ROUNDS):
            say(f"round {turn + 1} of {ROUNDS}")
            for trial in trials:
                trial.run(turn)
        for trial in trials:
            row = trial.measured(machine)
            say(
                f"{row.name}: {row.single_tokens_per_second:,.0f} tokens/s for one user, "
                f"{row.batch_tokens_per_second:,.0f} for {users}"
            )
            rows.append(row)
    return rows


def stream_one(lever: Lever, prompt: str, write: Callable[[str], None]) -> Timing:
    """Serve `lever` and stream one greedy answer to `write`."""

    async def answer(target: Target) -> Timing:
        timing = Timing()
        shown = 0
        task = asyncio.create_task(complete(target, prompt, ANSWER, into=timing, temperature=0))
        while not task.done() or shown < len(timing.text):
            await asyncio.sleep(0.01)
            write(timing.text[shown:])
            shown = len(timing.text)
        await task
        return timing

    with serve(lever.model, lever.options) as served:
        return asyncio.run(answer(Target(served.url, json.loads(served.get("/v1/models"))["data"][0]["id"])))


def _run(target: Target, texts: Sequence[str], concurrency: int) -> LoadResult:
    workload = [Request(0.0, text, ANSWER) for text in texts]
    timings = asyncio.run(run_load(target, workload, concurrency, ignore_eos=True, temperature=0))
    result = summarize(timings, Slo())
    if result.failed:
        raise RuntimeError(f"{result.failed} of {result.requests} requests failed: {result.errors[0]}")
    return result
