"""Serve the same text with one more lever each time; measure speed, memory and cost."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from farthing.bench.load import LoadResult, Request, Slo, Target, run_load, summarize
from farthing.cost.prices import Machine
from farthing.upstream import free_port
from farthing_lab.demo.processes import Say, Watch, fetch, running

ANSWER = 96  # tokens per request
USERS = 8
ROUNDS = 3
PROMPT = 400  # characters
LONG = 5_000  # characters, of a prompt that is read and not answered: about 1,500 tokens
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lever:
    """A serving configuration: a model and the options that enable a lever."""

    name: str
    model: str
    options: tuple[str, ...] = ()
    quality: str = ""  # perplexity change against the first lever, with interval


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one serving configuration, of a round or the medians of several."""

    single: float  # tokens per second of one user
    batch: float  # tokens per second of eight users at once
    prompt: float  # tokens of a long prompt per second
    ttft_ms: float  # median, eight users
    tpot_ms: float  # median, one user
    memory_bytes: float  # resident
    cpu_seconds_per_token: float

    @classmethod
    def medians(cls, rounds: Sequence[Measured]) -> Measured:
        """Each figure's median."""
        return cls(*(median(getattr(r, name) for r in rounds) for name in cls.__dataclass_fields__))

    def joules_per_token(self, machine: Machine) -> float:
        """Estimated: processor seconds × declared watts per core."""
        return self.cpu_seconds_per_token * machine.hardware.watts

    def usd_per_million(self, machine: Machine) -> float:
        """Dollars per million tokens, of eight users."""
        return machine.usd_per_second / self.batch * 1e6

    def against(self, before: Measured) -> str:
        """What differs from another row by 5 % or more, as multiples in which more is better."""
        gains = {
            "one user": self.single / before.single,
            f"{USERS} users": self.batch / before.batch,
            "prompts": self.prompt / before.prompt,
            "memory": before.memory_bytes / self.memory_bytes,
        }
        different = {name: gain for name, gain in gains.items() if abs(gain - 1) >= 0.05}
        return ", ".join(f"{name} {gain:.2f}x" for name, gain in different.items()) or "within 5 %"


def prompts(count: int, seed: int = 0, characters: int = PROMPT) -> list[str]:
    """Beginnings of held-out Python files, cut at a line end."""
    from farthing.compress.api import held_out_sample

    rng = random.Random(seed)
    texts = [json.loads(line)["text"] for line in held_out_sample().read_text(encoding="utf-8").splitlines()]
    texts = [text for text in texts if len(text) > characters] or ["".join(texts)]
    out: list[str] = []
    while len(out) < count:
        text = rng.choice(texts)
        start = text.find("\n", rng.randrange(max(1, len(text) - characters))) + 1
        out.append(text[start : start + characters])
    return out


class Server:
    """A running `farthing serve MODEL OPTIONS`, until the stack is left."""

    def __init__(self, stack: ExitStack, model: str, say: Say, options: Sequence[str] = ()) -> None:
        port = free_port("127.0.0.1")
        self._url = f"http://127.0.0.1:{port}"
        arguments = ["serve", model, "--port", str(port), *options]
        self._pid = stack.enter_context(running(arguments, self._url, say, signal.SIGTERM)).pid
        self._name, self._say = f"the server of {model}", say
        # A request that nobody computes leaves its server without work, which `Watch` sees.
        self.target = Target(
            self._url, json.loads(fetch(f"{self._url}/v1/models"))["data"][0]["id"], timeout=3600
        )

    def metric(self, name: str) -> float:
        """Sum of a metric's samples on /metrics."""
        rows = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", fetch(f"{self._url}/metrics"), re.MULTILINE)
        return sum(map(float, rows))

    def watched(self, work: Coroutine[Any, Any, T]) -> T:
        """What requests return. Raises RuntimeError if the server does nothing any more."""

        async def wait() -> T:
            task, watch = asyncio.ensure_future(work), Watch(self._name, self._pid, self._say)
            while not (await asyncio.wait([task], timeout=1))[0]:
                watch.look()
            return task.result()

        return asyncio.run(wait())

    def send(self, texts: Sequence[str], users: int, answer: int = ANSWER) -> LoadResult:
        """Raises RuntimeError if a request failed."""
        workload = [Request(0.0, text, answer) for text in texts]
        timings = self.watched(run_load(self.target, workload, users, ignore_eos=True, temperature=0))
        result = summarize(timings, Slo())
        if result.failed:
            raise RuntimeError(f"{result.failed} of {result.requests} requests failed: {result.errors[0]}")
        return result


class Trials:
    """The levers' servers, started with the first round. A round takes all levers one after another, so that
    a change in the machine's speed affects all of them; idle servers wait without the processor."""

    def __init__(self, stack: ExitStack, levers: Sequence[Lever], say: Say) -> None:
        self._stack, self._levers, self._say = stack, levers, say
        self._servers: list[Server] = []

    def round(self, turn: int) -> list[Measured]:
        """Every lever's measurements."""
        if not self._servers:
            for lever in self._levers:
                self._servers.append(Server(self._stack, lever.model, self._say, lever.options))
                self._servers[-1].send(prompts(2, seed=99), 1)  # warm-up
        return [self._measure(*pair, turn) for pair in zip(self._levers, self._servers, strict=True)]

    def _measure(self, lever: Lever, server: Server, turn: int) -> Measured:
        cpu = server.metric("process_cpu_seconds_total")
        single = server.send(prompts(2, seed=10 + turn), 1)
        batch = server.send(prompts(2 * USERS, seed=20 + turn), USERS)
        cpu = server.metric("process_cpu_seconds_total") - cpu
        long = server.send(prompts(3, seed=30 + turn, characters=LONG), 1, answer=1)
        found = Measured(
            single=single.output_tokens_per_second,
            batch=batch.output_tokens_per_second,
            prompt=(long.prompt_tokens - long.cached_tokens) / long.seconds,
            ttft_ms=batch.ttft_ms["p50"],
            tpot_ms=single.tpot_ms["p50"],
            memory_bytes=server.metric("process_resident_memory_bytes"),
            cpu_seconds_per_token=cpu / (single.output_tokens + batch.output_tokens),
        )
        self._say(
            f"{lever.name}: {found.single:,.0f} tokens/s for one user, {found.batch:,.0f} for {USERS}, "
            f"{found.prompt:,.0f} of a prompt"
        )
        return found
