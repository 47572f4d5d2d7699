"""Load on a server over HTTP: workloads, a client that times every token, latencies as users see them."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from farthing.bench.trace import read_requests
from farthing.config import check, option


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible server."""

    url: str  # http://127.0.0.1:8000
    model: str
    api_key: str | None = None
    timeout: float = 300.0  # seconds per request

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: got {self.url!r}; expected http://host:port or https://host:port")


@dataclass(slots=True)
class Timing:
    """Timings of one request, in seconds on the monotonic clock."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    start: float = 0.0
    first: float | None = None  # first token
    end: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of every streamed chunk
    counts: list[int] = field(default_factory=list)  # output tokens so far at each arrival, if reported
    text: str = ""
    reasoning: str = ""  # of a chat
    calls: list[dict[str, Any]] = field(default_factory=list)  # tool calls of a chat
    finished: bool = False  # a finish_reason has come
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return (self.first or self.end) - self.start

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first."""
        return (self.end - (self.first or self.end)) / max(self.output_tokens - 1, 1)

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last token."""
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens.

        A chunk may contain several tokens: accepted drafts, or the bytes of a completed character.
        Its gap is divided evenly among them.
        """
        between = [b - a for a, b in zip(self.arrivals[:-1], self.arrivals[1:], strict=True)]
        if len(self.counts) != len(self.arrivals):
            return between
        gaps: list[float] = []
        for gap, before, now in zip(between, self.counts[:-1], self.counts[1:], strict=True):
            tokens = now - before
            gaps += [gap / tokens] * tokens if tokens > 0 else []
        return gaps


async def complete(
    target: Target, prompt: str | list[int], max_tokens: int, into: Timing | None = None, **options: Any
) -> Timing:
    """Stream one /v1/completions request. A failure is recorded in `error`, never raised.

    into: updated while the response streams, for live display.
    """
    return await _stream(
        target, "/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **options}, into
    )


async def chat(target: Target, messages: list[dict[str, Any]], max_tokens: int, **options: Any) -> Timing:
    """Stream one /v1/chat/completions request. A failure is recorded in `error`, never raised.

    Built on asyncio streams, because a load generator that shares two cores with the server must be cheap.
    Works with any OpenAI-compatible server. If the server reports usage in every chunk
    (`continuous_usage_stats`, vLLM's extension), inter-token latency is per token; otherwise it is per chunk.
    """
    fields = {"messages": messages, "max_tokens": max_tokens, **options}
    return await _stream(target, "/v1/chat/completions", fields, None)


async def _stream(target: Target, path: str, fields: dict[str, Any], into: Timing | None) -> Timing:
    body = {
        "model": target.model,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **fields,
    }
    timing = into if into is not None else Timing()
    timing.start = time.perf_counter()
    try:
        await asyncio.wait_for(_exchange(target, path, json.dumps(body).encode(), timing), target.timeout)
    except TimeoutError:
        timing.error = f"no answer within {target.timeout:g} s"
    except (OSError, ValueError, EOFError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        timing.error = f"malformed event: {type(error).__name__}: {error}"
    timing.end = timing.end or time.perf_counter()
    # A server that sends no usage sends one chunk per token.
    timing.output_tokens = timing.output_tokens or len(timing.arrivals)
    return timing


async def _exchange(target: Target, path: str, body: bytes, timing: Timing) -> None:
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(
        parts.hostname, port, ssl=ssl.create_default_context() if secure else None
    )
    try:
        key = f"Authorization: Bearer {target.api_key}\r\n" if target.api_key else ""
        head = (
            f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = _status(await reader.readline())
        while (await reader.readline()).strip():
            pass
        if status != 200:
            timing.error = f"HTTP {status}: {(await reader.read(2000)).decode(errors='replace')}"
            return
        # Chunk sizes are lines that never start with "data:", so reading lines is enough.
        while line := await reader.readline():
            if line.startswith(b"data: ") and _event(line[6:].strip(), timing):
                return
        if not timing.finished:
            count = len(timing.arrivals)
            raise EOFError(
                f"the stream ended after {count} chunk{'s' * (count != 1)}, without a finish_reason or [DONE]"
            )
    finally:
        writer.close()


def _status(line: bytes) -> int:
    """The status code of a response's first line."""
    parts = line.split()
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
        raise ValueError(f"response: got {line[:40]!r}; expected an HTTP status line")
    return int(parts[1])


def _event(data: bytes, timing: Timing) -> bool:
    """Record one server-sent event; True at the end of the stream."""
    if data == b"[DONE]":
        timing.end = time.perf_counter()
        return True
    event = json.loads(data)
    if "error" in event:
        timing.error = json.dumps(event["error"])
        return True
    now = time.perf_counter()
    if choices := event.get("choices"):
        timing.first = timing.first or now
        timing.end = now
        timing.arrivals.append(now)
        _content(choices[0], timing)
    if usage := event.get("usage"):
        if choices:
            timing.counts.append(usage["completion_tokens"])
        timing.prompt_tokens = usage["prompt_tokens"]
        timing.output_tokens = usage["completion_tokens"]
        timing.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return False


def _content(choice: dict[str, Any], timing: Timing) -> None:
    """The text a chunk adds to a completion or a chat response."""
    timing.finished |= bool(choice.get("finish_reason"))
    delta = choice.get("delta") or {}
    timing.text += choice.get("text") or delta.get("content") or ""
    timing.reasoning += delta.get("reasoning_content") or ""
    for part in delta.get("tool_calls") or ():
        function = part.get("function") or {}
        if part.get("id"):
            empty = {"name": function.get("name"), "arguments": ""}
            timing.calls.append({"id": part["id"], "type": "function", "function": empty})
        timing.calls[part["index"]]["function"]["arguments"] += function.get("arguments") or ""


# Workloads of the load generator: synthetic prompts, or a recorded trace.

_option = partial(option, group="Options")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload."""

    at: float  # seconds after the start; 0 in a closed loop
    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of synthetic requests, in tokens."""

    input_tokens: int = _option(128, "Prompt tokens per request", minimum=1)
    output_tokens: int = _option(64, "Generated tokens per request", minimum=1)
    shared_prefix: int = _option(0, "Length of the shared prefix in tokens", minimum=0)
    vocabulary: int = _option(8000, "Upper bound of the random prompt token ids", minimum=1)

    def __post_init__(self) -> None:
        check(self)
        if self.shared_prefix >= self.input_tokens:
            raise ValueError(f"shared_prefix: got {self.shared_prefix}; expected 0 to input_tokens - 1")


def closed_loop(shape: Shape, count: int, seed: int = 0) -> list[Request]:
    """`count` requests to send as fast as the concurrency allows."""
    prompts = _Prompts(shape, seed)
    return [Request(0.0, prompts.sample(shape.input_tokens), shape.output_tokens) for _ in range(count)]


def poisson(shape: Shape, rate: float, count: int, seed: int = 0) -> list[Request]:
    """`count` requests with exponential gaps of mean 1 / rate seconds, rate > 0."""
    rng, prompts, at, out = random.Random(seed), _Prompts(shape, seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        out.append(Request(at, prompts.sample(shape.input_tokens), shape.output_tokens))
    return out


def from_trace(
    path: Path, shape: Shape, speed: float = 1.0, limit: int | None = None, max_len: int = 4096, seed: int = 0
) -> list[Request]:
    """Replay a trace's arrivals and lengths (prompt + output clipped to max_len), `speed` times as fast.

    Formats: those of `farthing_lab.replay.trace.read_requests`; hash_ids become shared prefixes.
    """
    rows = read_requests(path)[:limit]
    if not rows:
        raise ValueError(f"{path} has no requests; expected a CSV or JSON-lines trace")
    prompts, start = _Prompts(shape, seed), rows[0].at_s
    out = []
    for at, inputs, outputs, blocks in rows:
        outputs = max(1, min(outputs, max_len // 2))
        inputs = max(1, min(inputs, max_len - outputs))
        out.append(Request((at - start) / speed, prompts.sample(inputs, blocks), outputs))
    return out


class _Prompts:
    """Random token ids; equal prefix blocks produce equal ids."""

    BLOCK = 512  # tokens per hash_id in the Mooncake trace

    def __init__(self, shape: Shape, seed: int) -> None:
        self._rng = random.Random(seed)
        self._seed = seed
        self._vocabulary = shape.vocabulary
        self._prefix = self._ids(self._rng, shape.shared_prefix)

    def _ids(self, rng: random.Random, count: int) -> list[int]:
        # Low ids are special tokens in most vocabularies.
        return [rng.randrange(min(300, self._vocabulary // 2), self._vocabulary) for _ in range(count)]

    def sample(self, length: int, blocks: Sequence[int] = ()) -> list[int]:
        ids = list(self._prefix)
        for block in blocks[: length // self.BLOCK]:
            ids += self._ids(random.Random(f"{self._seed}:{block}"), self.BLOCK)
        return (ids + self._ids(self._rng, max(0, length - len(ids))))[:length]


def plot_latencies(timings: Sequence[Timing], path: Path) -> None:
    """Plot cumulative curves of TTFT and TPOT. Requires matplotlib (extra `train`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [t for t in timings if t.error is None]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    series = {"TTFT": [t.ttft for t in good], "TPOT": [t.tpot for t in good if t.output_tokens > 1]}
    for axis, (name, seconds) in zip(axes, series.items(), strict=True):
        values = np.sort(np.asarray(seconds) * 1000)
        axis.plot(values, np.arange(1, len(values) + 1) / max(len(values), 1), color="#2563eb")
        axis.set(xlabel=f"{name}, ms", xlim=(0, None), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets per request, in seconds."""

    ttft: float = 2.0
    tpot: float = 0.2

    def kept(self, timing: Timing) -> bool:
        """Whether a request met both targets."""
        return timing.error is None and timing.ttft <= self.ttft and timing.tpot <= self.tpot


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Results of a run; latencies in milliseconds by percentile."""

    requests: int
    failed: int
    errors: tuple[str, ...]  # distinct, at most five
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    itl_ms: dict[str, float]
    e2e_ms: dict[str, float]
    goodput: float  # share of requests within the SLO
    usd_per_hour: float | None

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens per second over the whole run."""
        return self.output_tokens / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        """Prompt and generated tokens per second over the whole run."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Completed requests per second."""
        return (self.requests - self.failed) / self.seconds

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Price per million generated tokens on hardware at this hourly price."""
        if self.usd_per_hour is None or not self.output_tokens:
            return None
        return self.usd_per_hour / 3600 * self.seconds / self.output_tokens * 1e6

    def to_json(self) -> dict[str, Any]:
        """All figures, including derived ones."""
        names = ("output_tokens_per_second", "total_tokens_per_second", "requests_per_second")
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        derived = {name: getattr(self, name) for name in (*names, "usd_per_million_tokens")}
        return fields | derived


async def run_load(
    target: Target,
    workload: Sequence[Request],
    concurrency: int | None = None,
    on_done: Callable[[Timing], None] = lambda _: None,
    **options: Any,
) -> list[Timing]:
    """Send requests at their times, or `concurrency` at a time in order; returns timings in order."""
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency: got {concurrency}; expected at least 1, or none for an open loop")
    gate = asyncio.Semaphore(concurrency or len(workload) or 1)
    start = time.perf_counter()

    async def one(request: Request) -> Timing:
        async with gate:
            if concurrency is None:
                await asyncio.sleep(max(0.0, start + request.at - time.perf_counter()))
            timing = await complete(target, request.prompt, request.max_tokens, **options)
            on_done(timing)
            return timing

    return await asyncio.gather(*(one(r) for r in workload))


def summarize(timings: Sequence[Timing], slo: Slo, usd_per_hour: float | None = None) -> LoadResult:
    """Percentiles over successful requests; failures lower the goodput."""
    good = [t for t in timings if t.error is None]
    gaps = [gap for t in good for gap in t.gaps]
    errors = dict.fromkeys(t.error for t in timings if t.error is not None)
    return LoadResult(
        requests=len(timings),
        failed=len(timings) - len(good),
        errors=tuple(errors)[:5],
        seconds=max(t.end for t in timings) - min(t.start for t in timings),
        prompt_tokens=sum(t.prompt_tokens for t in good),
        cached_tokens=sum(t.cached_tokens for t in good),
        output_tokens=sum(t.output_tokens for t in good),
        ttft_ms=percentiles([t.ttft for t in good]),
        tpot_ms=percentiles([t.tpot for t in good if t.output_tokens > 1]),
        itl_ms=percentiles(gaps),
        e2e_ms=percentiles([t.e2e for t in good]),
        goodput=sum(slo.kept(t) for t in timings) / len(timings),
        usd_per_hour=usd_per_hour,
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds by percentile; empty without values."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1000, PERCENTILES)
    return {f"p{p}": round(float(v), 3) for p, v in zip(PERCENTILES, values, strict=True)}


@dataclass(frozen=True, slots=True)
class MeasuredRate:
    """One measured rate."""

    rate: float  # requests per second
    goodput: float
    ttft_p99_ms: float
    tpot_p99_ms: float


@dataclass(frozen=True, slots=True)
class Capacity:
    """The capacity, with all trials."""

    requests_per_second: float
    tokens_per_second: float  # prompt + output at that rate
    output_tokens_per_second: float
    slo: Slo
    goodput: float  # required share of requests within the SLO
    trials: tuple[MeasuredRate, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON-serializable values."""
        return asdict(self)


def find_capacity(
    target: Target,
    shape: Shape,
    slo: Slo,
    goodput: float = 0.99,
    seconds: float = 20.0,
    precision: float = 0.05,
    on_trial: Callable[[MeasuredRate], None] = lambda _: None,
) -> Capacity:
    """Bisect Poisson rates between zero and the closed-loop throughput, `seconds` per trial.

    Stops when the bracket is within `precision` of its upper end. Raises RuntimeError if the server fails.
    """
    ceiling = asyncio.run(_ceiling(target, shape))
    low, high, best = 0.0, ceiling * 1.2, None
    trials: list[MeasuredRate] = []
    while high - low > precision * high:
        rate = (low + high) / 2
        result = _trial(target, shape, slo, rate, seconds, seed=len(trials))
        trial = MeasuredRate(
            rate, result.goodput, result.ttft_ms.get("p99", 0.0), result.tpot_ms.get("p99", 0.0)
        )
        trials.append(trial)
        on_trial(trial)
        if result.goodput >= goodput:
            low, best = rate, result
        else:
            high = rate
        if best is None and high < ceiling / 64:
            break
    per_request = (best.prompt_tokens + best.output_tokens) / best.requests if best else 0.0
    outputs = best.output_tokens / best.requests if best else 0.0
    return Capacity(low, low * per_request, low * outputs, slo, goodput, tuple(trials))


async def _ceiling(target: Target, shape: Shape) -> float:
    """Requests/s with 32 always in flight, an upper bound for any open loop."""
    timings = await run_load(target, closed_loop(shape, 96, seed=987), concurrency=32)
    result = summarize(timings, Slo())
    if result.failed:
        raise RuntimeError(
            f"{result.failed} of {result.requests} warm-up requests failed: {result.errors[0]}"
        )
    return result.requests_per_second


def _trial(target: Target, shape: Shape, slo: Slo, rate: float, seconds: float, seed: int) -> LoadResult:
    count = max(20, round(rate * seconds))
    return summarize(asyncio.run(run_load(target, poisson(shape, rate, count, seed))), slo)
