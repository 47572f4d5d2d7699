"""Load traces: recognized by their columns, plain or gzip; and the load of a replay made from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farthing.fleet.series import Series, open_text, read_series, seconds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXAMPLE = Path(__file__).parent / "traces" / "servegen_reason_deepseek-r1_rate.csv"


@dataclass(frozen=True)
class RequestTrace:
    """Single requests, in the order of their arrival."""

    name: str
    arrival_s: Floats  # [R] seconds after the first request
    prompt_tokens: Ints  # [R]
    output_tokens: Ints  # [R]

    def __len__(self) -> int:
        return len(self.arrival_s)


def read_trace(path: str | Path) -> Series | RequestTrace:
    """A rate series (load units a second) or single requests.

    Raises FileNotFoundError, or ValueError naming what was found and the four formats that are known.
    """
    path = Path(path)
    with open_text(path) as file:
        first = file.readline().strip()
    if first.startswith("{"):
        return _json_lines(path)
    columns = [name.strip() for name in first.split(",")]
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(columns):
        return _azure(path)
    if {"t_s", "total_rate_rps"} <= set(columns):
        return read_series(path)
    if {"timestamp", "value"} <= set(columns):
        counts = read_series(path)
        return Series(counts.start, counts.step_s, counts.values / counts.step_s, counts.name)
    raise ValueError(
        f"{path}: first line {first[:60]!r}; known are CSV with TIMESTAMP,ContextTokens,GeneratedTokens or "
        "t_s,total_rate_rps or timestamp,value, and JSON lines with timestamp,input_length,output_length"
    )


def _requests(path: Path, rows: Iterable[tuple[float, int, int]]) -> RequestTrace:
    data = np.array(sorted(rows), dtype=np.float64)
    if len(data) < 2:
        raise ValueError(f"{path}: {len(data)} requests; a replay needs two or more")
    prompts = np.maximum(1, data[:, 1]).astype(np.int64)
    outputs = np.maximum(1, data[:, 2]).astype(np.int64)
    return RequestTrace(path.name.split(".")[0], data[:, 0] - data[0, 0], prompts, outputs)


def _azure(path: Path) -> RequestTrace:
    with open_text(path) as file:
        rows = [
            (seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]
    return _requests(path, rows)


def _json_lines(path: Path) -> RequestTrace:
    rows = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append(
                    (float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"]))
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error!r}; needed: timestamp (ms), input_length, output_length"
                ) from error
    return _requests(path, rows)


def rate_load(series: Series, dt: float, seeds: int, noise: float = 0.1, noise_s: float = 10.0) -> Floats:
    """[N, B] load at every `dt` seconds: the line between the trace's points, times gamma noise of mean 1.

    `noise` is the standard deviation of the factor, drawn anew every `noise_s` seconds for each of
    `seeds` lanes.
    """
    if seeds < 1:
        raise ValueError(f"seeds = {seeds}: 1 or more is needed")
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
