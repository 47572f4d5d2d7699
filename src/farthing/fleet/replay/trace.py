"""Load traces, plain or gzip, detected by their columns, and the load of a replay."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farthing.fleet.series import Series, open_text, read_series, seconds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK = 512  # tokens per block of a prompt, as in the Mooncake traces
EXAMPLE = Path(__file__).parent / "traces" / "servegen_reason_deepseek-r1_rate.csv"


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


class Arrival(NamedTuple):
    """One request of a trace."""

    at_s: float  # seconds, by the trace's own clock
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # ids of its prompt's leading blocks; equal ids mean equal text


def read_trace(path: str | Path) -> Series | RequestTrace:
    """Read a rate series (load units per second) or single requests.

    Raises FileNotFoundError, or ValueError with the first line and the four supported formats.
    """
    path = Path(path)
    columns = _columns(_first_line(path))
    if {"t_s", "total_rate_rps"} <= columns:
        return read_series(path)
    if {"timestamp", "value"} <= columns:
        counts = read_series(path)
        return Series(counts.start, counts.step_s, counts.values / counts.step_s, counts.name)
    rows = read_requests(path, "; CSV with t_s,total_rate_rps or timestamp,value")
    if len(rows) < 2:
        raise ValueError(f"{path}: got {len(rows)} requests; expected at least two")
    data = np.array([row[:3] for row in rows], dtype=np.float64)
    prompts, outputs = np.maximum(1, data[:, 1:]).astype(np.int64).T
    blocks = tuple(row.blocks for row in rows)
    return RequestTrace(path.name.split(".")[0], data[:, 0] - data[0, 0], prompts, outputs, blocks)


def read_requests(path: str | Path, others: str = "") -> list[Arrival]:
    """Read single requests, ordered by arrival, from a plain or gzip file.

    Raises FileNotFoundError, or ValueError with the first line and the supported formats, including `others`.
    """
    path = Path(path)
    first = _first_line(path)
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= _columns(first):
        rows = _azure(path)
    elif first.startswith("{"):
        rows = _json_lines(path)
    else:
        raise ValueError(
            f"{path}: first line {first[:60]!r}; expected CSV with TIMESTAMP,ContextTokens,"
            f"GeneratedTokens; JSON lines with timestamp,input_length,output_length{others}"
        )
    return sorted(rows, key=lambda row: row.at_s)


def _first_line(path: Path) -> str:
    with open_text(path) as file:
        return file.readline().strip()


def _columns(line: str) -> set[str]:
    return {name.strip() for name in line.split(",")}


def _azure(path: Path) -> list[Arrival]:
    with open_text(path) as file:
        return [
            Arrival(seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]


def _json_lines(path: Path) -> list[Arrival]:
    rows = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                at_s, blocks = float(row["timestamp"]) / 1000, tuple(row.get("hash_ids", ()))
                rows.append(Arrival(at_s, int(row["input_length"]), int(row["output_length"]), blocks))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error!r}; expected timestamp (ms), input_length, output_length"
                ) from error
    return rows


def rate_load(series: Series, dt: float, seeds: int, noise: float = 0.1, noise_s: float = 10.0) -> Floats:
    """[N, B] load at every `dt` seconds: the trace, linearly interpolated, times gamma noise of mean 1.

    `noise` is the standard deviation of the factor, redrawn every `noise_s` seconds for each of `seeds`
    lanes.
    """
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}; expected 1 or more")
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
