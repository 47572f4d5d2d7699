"""Load traces, plain or gzip, detected by their columns, and the load of a replay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farthing.bench.trace import MAX_SPAN_S, columns, first_line, requests_of
from farthing_lab.series import Series, read_series

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BIN_S = 5.0  # of the rate of single requests
BLOCK = 512  # tokens per block of a prompt, as in the Mooncake traces
EXAMPLE = Path(__file__).parent / "traces" / "servegen_language_m-mid_rate.csv"


@dataclass(frozen=True)
class RequestTrace:
    """Single requests, in the order of their arrival."""

    name: str
    arrival_s: Floats  # [R] seconds after the first request
    prompt_tokens: Ints  # [R]
    output_tokens: Ints  # [R]
    blocks: tuple[tuple[int, ...], ...] = ()  # [R] ids of each prompt's leading blocks of BLOCK tokens

    def __len__(self) -> int:
        return len(self.arrival_s)


def read_trace(path: str | Path) -> Series | RequestTrace:
    """Read a rate series (load units per second) or single requests.

    Raises FileNotFoundError, or ValueError with the first line and the four supported formats.
    """
    path = Path(path)
    first = first_line(path)
    names = set(columns(first))
    if {"t_s", "total_rate_rps"} <= names or {"timestamp", "value"} <= names:
        return read_series(path, MAX_SPAN_S)
    rows = requests_of(path, first, "; CSV with t_s,total_rate_rps or timestamp,value")
    if len(rows) < 2:
        raise ValueError(f"{path}: got {len(rows)} requests; expected at least two")
    data = np.array([row[:3] for row in rows], dtype=np.float64)
    prompts, outputs = np.maximum(1, data[:, 1:]).astype(np.int64).T
    blocks = tuple(row.blocks for row in rows)
    return RequestTrace(path.name.split(".")[0], data[:, 0] - data[0, 0], prompts, outputs, blocks)


def binned(trace: RequestTrace) -> Series:
    """The rate of requests in bins of `BIN_S`."""
    count = max(4, math.ceil(float(trace.arrival_s[-1]) / BIN_S) + 1)
    counts = np.bincount((trace.arrival_s / BIN_S).astype(int), minlength=count)
    return Series(0.0, BIN_S, counts / BIN_S, trace.name)


def rate_load(series: Series, dt: float, seeds: int, noise: float = 0.1, noise_s: float = 10.0) -> Floats:
    """[N, B] load at every `dt` seconds: the trace, linearly interpolated, times gamma noise of mean 1.

    `noise` is the standard deviation of the factor, redrawn every `noise_s` seconds for each of `seeds`
    lanes.
    """
    steps = round(len(series) * series.step_s / dt)
    middle = (np.arange(steps) + 0.5) * dt
    base = np.interp(middle, np.arange(len(series)) * series.step_s, series.values)
    if noise == 0:
        return np.repeat(base[:, None], seeds, axis=1)
    every = max(1, round(noise_s / dt))
    draws = -(-steps // every)
    load = np.empty((steps, seeds))
    for seed in range(seeds):
        factor = np.random.default_rng(seed).gamma(1 / noise**2, noise**2, draws)
        load[:, seed] = base * np.repeat(factor, every)[:steps]
    return load
