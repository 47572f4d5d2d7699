"""Load traces, plain or gzip, detected by their columns, and the load of a replay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farthing.fleet.series import DAY_S, Series, read_series
from farthing.fleet.trace_file import Row, check_span, columns, csv_rows, first_line, open_text

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK = 512  # tokens per block of a prompt, as in the Mooncake traces
_MAX_TIME_MS = 1e14
_MAX_SPAN_S = 731 * DAY_S  # a replay allocates arrays of seconds
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
    first = first_line(path)
    names = set(columns(first))
    if {"t_s", "total_rate_rps"} <= names:
        return read_series(path, _MAX_SPAN_S)
    if {"timestamp", "value"} <= names:
        counts = read_series(path, _MAX_SPAN_S)
        return Series(counts.start, counts.step_s, counts.values / counts.step_s, counts.name)
    rows = _requests(path, first, "; CSV with t_s,total_rate_rps or timestamp,value")
    if len(rows) < 2:
        raise ValueError(f"{path}: got {len(rows)} requests; expected at least two")
    data = np.array([row[:3] for row in rows], dtype=np.float64)
    prompts, outputs = np.maximum(1, data[:, 1:]).astype(np.int64).T
    blocks = tuple(row.blocks for row in rows)
    return RequestTrace(path.name.split(".")[0], data[:, 0] - data[0, 0], prompts, outputs, blocks)


def read_requests(path: str | Path) -> list[Arrival]:
    """Read single requests, ordered by arrival, from a plain or gzip file.

    Raises FileNotFoundError, or ValueError with the first line and the supported formats.
    """
    path = Path(path)
    return _requests(path, first_line(path))


def _requests(path: Path, first: str, others: str = "") -> list[Arrival]:
    """`read_requests` of a file whose first line is known; others: formats that the caller reads too."""
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(columns(first)):
        when, rows = "TIMESTAMP", list(_azure(path))
    elif first.startswith("{"):
        when, rows = "timestamp", list(_json_lines(path))
    else:
        raise ValueError(
            f"{path}: first line {first[:60]!r}; expected CSV with TIMESTAMP,ContextTokens,"
            f"GeneratedTokens; JSON lines with timestamp,input_length,output_length{others}"
        )
    lines, made = [line for line, _ in rows], [one for _, one in rows]
    check_span(path, when, [one.at_s for one in made], lines, _MAX_SPAN_S)
    return sorted(made, key=lambda one: one.at_s)


def _azure(path: Path) -> Iterator[tuple[int, Arrival]]:
    for row in csv_rows(path):
        at_s, prompt = row.time("TIMESTAMP"), row.count("ContextTokens")
        yield row.line, Arrival(at_s, prompt, row.count("GeneratedTokens"))


def _json_lines(path: Path) -> Iterator[tuple[int, Arrival]]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _json_row(path, number, line)
            at_s = row.number("timestamp", -_MAX_TIME_MS, _MAX_TIME_MS) / 1000
            prompt, output = row.count("input_length"), row.count("output_length")
            yield number, Arrival(at_s, prompt, output, _blocks(row))


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}: not JSON ({error}); expected one object per line"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}, line {number}: got {line.strip()[:60]}; expected a JSON object")
    return Row(path, number, fields)


def _blocks(row: Row) -> tuple[int, ...]:
    ids = row.fields.get("hash_ids") or ()
    if not isinstance(ids, list | tuple) or not all(isinstance(one, int) for one in ids):
        raise row.wrong("hash_ids", "a list of integers")
    return tuple(ids)


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
