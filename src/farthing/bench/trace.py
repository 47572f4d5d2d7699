"""Reading trace files, plain or gzip: every error names the file, and where possible the line and field."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

_MS_FROM = 1e11  # epochs from here on are milliseconds: as seconds they would be after the year 5000
_MAX_EPOCH = 1e14
TIMES = "a time such as 2024-05-10 00:00:01, …Z or …+00:00, or a Unix time in seconds or milliseconds"


@dataclass(frozen=True)
class Row:
    """One row of a trace file."""

    path: Path
    line: int  # from 1
    fields: dict[str, Any]

    def wrong(self, name: str, expected: str) -> ValueError:
        return ValueError(
            f"{self.path}, line {self.line}, {name}: got {self.fields.get(name)!r:.60}; expected {expected}"
        )

    def number(self, name: str, least: float, most: float) -> float:
        expected = f"a number from {least:g} to {most:g}"
        try:
            value = float(self.fields[name])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self.wrong(name, expected) from error
        if not least <= value <= most:
            raise self.wrong(name, expected)
        return value

    def count(self, name: str, most: float = 1e9) -> int:
        value = self.number(name, 0, most)
        if value != int(value):
            raise self.wrong(name, f"a whole number from 0 to {most:g}")
        return int(value)

    def time(self, name: str) -> float:
        try:
            return seconds(self.fields[name])
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise self.wrong(name, TIMES) from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text stream of a plain or gzip file, detected by its first two bytes.

    Raises FileNotFoundError, or ValueError also while the stream is read in the context.
    """
    if not path.is_file():
        raise FileNotFoundError(f"trace {path} does not exist")
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    raw: Any = gzip.open(path, "rb") if zipped else path.open("rb")  # noqa: SIM115
    try:
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            yield text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or incomplete gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); expected a text file, plain or gzip") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error})") from error


def first_line(path: Path) -> str:
    with open_text(path) as file:
        return file.readline().strip()


def columns(line: str) -> tuple[str, ...]:
    """Names in the first line of a CSV file."""
    return tuple(name.strip() for name in next(csv.reader([line]), []))


def csv_rows(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        reader = csv.DictReader(file)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for fields in reader:
            yield Row(path, reader.line_num, fields)


def seconds(text: str) -> float:
    """Seconds since the epoch of an ISO timestamp (UTC unless it names a zone) or a Unix time in s or ms.

    Fractions of an ISO timestamp are truncated to microseconds. Raises ValueError.
    """
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return _iso(text)
    if len(text) == 8 and text.isdigit():  # a date such as 20140701
        return _iso(text)
    if not (math.isfinite(number) and 0 <= number < _MAX_EPOCH):
        raise ValueError(f"time: got {text}; expected {TIMES}")
    return number if number < _MS_FROM else number / 1000


def _iso(text: str) -> float:
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def check_span(path: Path, name: str, times: list[float], lines: list[int], most_s: float) -> None:
    """Raise ValueError for times that span more than `most_s`, naming the line farthest from the median."""
    if not times or max(times) - min(times) <= most_s:
        return
    median = sorted(times)[(len(times) - 1) // 2]
    line, _ = max(zip(lines, times, strict=True), key=lambda row: abs(row[1] - median))
    with open_text(path) as file:
        text = next(islice(file, line - 1, None)).strip()
    raise ValueError(
        f"{path}, line {line}, {name}: got {text!r:.80}; expected all times within {most_s:,.0f} s"
    )


_MAX_TIME_MS = 1e14


MAX_SPAN_S = 731 * 86_400.0  # a replay allocates arrays of seconds


class Arrival(NamedTuple):
    """One request of a trace."""

    at_s: float  # seconds, by the trace's own clock
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # ids of its prompt's leading blocks; equal ids mean equal text


def read_requests(path: str | Path) -> list[Arrival]:
    """Read single requests, ordered by arrival, from a plain or gzip file.

    Raises FileNotFoundError, or ValueError with the first line and the supported formats.
    """
    path = Path(path)
    return requests_of(path, first_line(path))


def requests_of(path: Path, first: str, others: str = "") -> list[Arrival]:
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
    check_span(path, when, [one.at_s for one in made], lines, MAX_SPAN_S)
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
