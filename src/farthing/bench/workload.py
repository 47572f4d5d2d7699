"""Workloads of the load generator: synthetic prompts, or a recorded trace."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from farthing.fleet.replay.trace import read_requests
from farthing.options import check, option

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

    Formats: those of `farthing.fleet.replay.trace.read_requests`; hash_ids become shared prefixes.
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
