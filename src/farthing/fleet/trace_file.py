"""Reading trace files, plain or gzip: every error names the file, and where possible the line and field."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

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
