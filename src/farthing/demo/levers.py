"""Serve the same text with one more lever each time; measure speed, memory and cost."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from farthing.bench.client import Target, Timing, complete
from farthing.bench.load import LoadResult, Slo, run_load, summarize
from farthing.bench.workload import Request
from farthing.cost import Machine
from farthing.demo.server import Served, serve

ANSWER = 96  # tokens per request
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
    seconds_to_ready: float
    single_tokens_per_second: float  # one user
    batch_tokens_per_second: float  # eight users at once
    ttft_ms: float  # median, eight users
    tpot_ms: float  # median, one user
    memory_bytes: int  # peak resident
    weight_bytes: int
    cached_share: float  # share of prompt tokens, when the prompts are repeated
    drafts_accepted: float | None  # share of draft tokens accepted
    cpu_seconds_per_token: float
    joules_per_token: float  # estimated: CPU seconds × declared watts
    usd_per_million_tokens: float
    quality: str


def prompts(count: int, seed: int = 0) -> list[str]:
    """Beginnings of held-out Python files, cut at a line end."""
    from farthing.compress.gate import held_out_sample

    rng = random.Random(seed)
    texts = [json.loads(line)["text"] for line in held_out_sample().read_text(encoding="utf-8").splitlines()]
    out: list[str] = []
    while len(out) < count:
        text = rng.choice(texts)
        start = text.find("\n", rng.randrange(max(1, len(text) - PROMPT_CHARACTERS))) + 1
        out.append(text[start : start + PROMPT_CHARACTERS])
    return out


def measure(lever: Lever, machine: Machine, say: Callable[[str], None], users: int = 8) -> Measured:
    """Serve `lever`: one user, then `users` concurrently, then the same prompts again."""
    with serve(lever.model, lever.options) as served:
        target = Target(served.url, json.loads(served.get("/v1/models"))["data"][0]["id"])
        _run(target, prompts(2, seed=99), 1)  # warm-up
        cpu, started = served.cpu_seconds(), served.metric("farthing:generation_tokens_total")
        single = _run(target, prompts(6, seed=1), 1)
        many = prompts(4 * users, seed=2)
        batch = _run(target, many, users)
        again = _run(target, many, users)
        generated = served.metric("farthing:generation_tokens_total") - started
        cpu_per_token = (served.cpu_seconds() - cpu) / generated
        say(
            f"{lever.name}: {single.output_tokens_per_second:,.0f} tokens/s for one user, "
            f"{batch.output_tokens_per_second:,.0f} for {users}"
        )
        watts = machine.hardware.watts  # per core
        return Measured(
            name=lever.name,
            seconds_to_ready=served.seconds_to_ready,
            single_tokens_per_second=single.output_tokens_per_second,
            batch_tokens_per_second=batch.output_tokens_per_second,
            ttft_ms=batch.ttft_ms["p50"],
            tpot_ms=single.tpot_ms["p50"],
            memory_bytes=served.peak_memory(),
            weight_bytes=_weight_bytes(lever),
            cached_share=again.cached_tokens / max(again.prompt_tokens, 1),
            drafts_accepted=_accepted(served),
            cpu_seconds_per_token=cpu_per_token,
            joules_per_token=cpu_per_token * watts,
            usd_per_million_tokens=machine.usd_per_second / batch.output_tokens_per_second * 1e6,
            quality=lever.quality,
        )


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


def _accepted(served: Served) -> float | None:
    drafted = served.metric("farthing:spec_decode_num_draft_tokens_total")
    if not drafted:
        return None
    return served.metric("farthing:spec_decode_num_accepted_tokens_total") / drafted


def _weight_bytes(lever: Lever) -> int:
    from farthing.hub import resolve_model

    return sum(f.stat().st_size for f in resolve_model(lever.model).glob("*.safetensors"))
