"""Writes a packed file part by part, so that a model larger than memory can be packed.

A thread writes each part while the next one is packed; at most two parts are in memory. Sections go to
`TARGET.partial`, and after each part a line with their index entries to `TARGET.parts`, once the data is on
disk. A killed run resumes after its last complete part. The file gets its magic number and its name only when
it is complete, so an unfinished one is never served. A resumed run compares the checksums of what it found
and packs again from the first part that is damaged. A lock on `TARGET.partial` keeps a second process out.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from farthing import _native
from farthing.ops.cpu.packed_file import (
    CHECKED_AT_ONCE,
    PAGE,
    close_index,
    drop_cached,
    head_of,
    section_checksum,
    write_section,
)
from farthing.ops.weights import InputRounding

log = logging.getLogger(__name__)


class PackedWriter:
    """Writes `target`; use it with `with`, then call `finish`."""

    def __init__(self, target: Path, quantization: str | None, source: str) -> None:
        """Resumes an unfinished file of the same checkpoint, quantization and ISA; replaces another one.

        Raises ValueError if `target` is a directory, or if another process is packing it.
        """
        if target.is_dir():
            raise ValueError(f"packed file {target} is a directory; expected the name of a file")
        self._target = target
        self._partial, self._parts = (
            target.with_name(f"{target.name}.{end}") for end in ("partial", "parts")
        )
        self._head = head_of(quantization, source, _native.instruction_sets().split()[0])
        self._entries: dict[str, dict[str, Any]] = {}
        self._done: set[str] = set()
        self._file: BinaryIO = self._claimed()
        end = self._resumed()
        self._names = set(self._entries)
        self._file.truncate(end or PAGE)
        self._file.seek(0, os.SEEK_END)
        self._log = self._parts.open("a" if end else "w", encoding="utf-8")
        if not end:
            self._append(self._head)
        self._thread = ThreadPoolExecutor(1, "packed-file-writer")
        self._written: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()
        with suppress(OSError):  # of data whose write has failed before, or that no line of the log counts
            self._file.close()
        self._log.close()

    def __contains__(self, part: object) -> bool:
        return part in self._done

    def add(
        self, part: str, blobs: Iterable[tuple[str, Any]], inputs: Mapping[str, InputRounding] | None = None
    ) -> None:
        """Write one part in the background, after the previous one, whose errors are raised here.

        Raises ValueError for a name that was written before.
        """
        named = list(blobs)
        for name, _ in named:
            if name in self._names:
                raise ValueError(f"weight name {name!r} was packed twice; expected every name once")
            self._names.add(name)
        self._wait()
        self._done.add(part)
        self._written = self._thread.submit(self._write, part, named, inputs or {})

    def _write(self, part: str, blobs: list[tuple[str, Any]], inputs: Mapping[str, InputRounding]) -> None:
        """Write one part and make it durable."""
        with self._named():
            entries = {name: write_section(self._file, name, blob, inputs.get(name)) for name, blob in blobs}
            drop_cached(self._file)
        self._append({"part": part, "end": self._file.tell(), "entries": entries})
        self._entries |= entries

    def _wait(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def finish(self) -> None:
        """Write the index and give the file its name. Raises the errors of the last part."""
        self._wait()
        with self._named():
            close_index(self._file, self._head | {"entries": self._entries})
            drop_cached(self._file)
        self._partial.replace(self._target)
        self._parts.unlink()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the file in errors of writing to it."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._partial)
            raise

    def _append(self, line: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        os.fsync(self._log.fileno())

    def _claimed(self) -> BinaryIO:
        """`TARGET.partial`, opened, created if missing, and locked until it is closed."""
        file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"{self._target}: another process is packing it; expected one at a time"
            ) from None
        if self._partial.exists() and os.path.samestat(os.fstat(file.fileno()), self._partial.stat()):
            return file
        file.close()  # it became the target of a process that has just finished
        return self._claimed()

    def _resumed(self) -> int:
        """Read what an unfinished run recorded; the end of its last part, 0 if there is nothing to resume."""
        if not self._parts.is_file():
            return 0
        end = 0
        with self._parts.open(encoding="utf-8", errors="replace") as file:
            if _parsed(file.readline()) != self._head:
                return 0
            for text in file:
                line = _parsed(text)
                if not _is_part(line):  # cut off by the kill, or damaged
                    break
                if (damaged := self._damaged(line)) is not None:
                    log.warning(
                        "%s: %r is damaged; packing again from %s", self._partial, damaged, line["part"]
                    )
                    break
                self._entries |= line["entries"]
                self._done.add(line["part"])
                end = line["end"]
        if end:
            self._drop_after_last_part()
        return end

    def _damaged(self, line: Mapping[str, Any]) -> str | None:
        """The first section of a recorded part that is not in the file as it was written."""
        for name, entry in line["entries"].items():
            try:
                self._file.seek(entry["offset"])
                data = _chunks(self._file, entry["bytes"])
                if section_checksum(name, data) != entry["checksum"]:
                    return str(name)
            except (KeyError, TypeError, ValueError, OSError):
                return str(name)
        return None if line["end"] <= self._file.seek(0, os.SEEK_END) else "its end"

    def _drop_after_last_part(self) -> None:
        lines = self._parts.read_text(encoding="utf-8", errors="replace").splitlines()[: 1 + len(self._done)]
        self._parts.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (data := file.read(min(size, CHECKED_AT_ONCE))):
        yield data
        size -= len(data)


def _parsed(line: str) -> Any:
    """The JSON of a complete line; None for another one."""
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_part(line: Any) -> bool:
    fields = {"part": str, "end": int, "entries": dict}
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in fields.items())
