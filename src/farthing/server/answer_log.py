"""Answers on disk, next to the blocks of the prefix cache that hold them, so that both outlive the process.

Each process appends to files of its own in the cache's directory, named by the identity of the blocks. A
record has a checksum: what a crash cut off, or another program wrote, is ignored. The oldest files are
removed.
"""

from __future__ import annotations

import logging
import os
import queue
import struct
import threading
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import xxhash

log = logging.getLogger(__name__)

DIRECTORY_BYTES = 32 << 20  # of all models' files
FILE_BYTES = DIRECTORY_BYTES // 16
_SUFFIX = ".answers"
_MAGIC = b"FARTHANS\x01\0\0\0\0\0\0\0"
_RECORD = struct.Struct("<QQQIIHxx")  # checksum of the rest, key, opening, numbers of tokens and of bytes
_MOST_WAITING = 256  # records, while the disk hangs; later ones are not stored
_LONGEST_NAME = 1024  # characters of a client's name


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote. opening: digest of the text up to its first control token. prompt: how many of the
    tokens are the prompt's, after its last control token; the answer follows."""

    opening: int
    prompt: int
    tokens: array[int]  # of type "I"


Record = tuple[str, int, Written]  # client and key


class AnswerLog:
    """The files of one folder of cached blocks."""

    def __init__(self, folder: Path) -> None:
        """folder: its name identifies model and cache; the files are next to it."""
        self._root, self._prefix = folder.parent, f"{folder.name}-"
        self._queue: queue.Queue[Record | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="farthing-answers", daemon=True)
        self._started = False

    def read(self) -> Iterator[Record]:
        """All intact records, the oldest first."""
        room, contents = DIRECTORY_BYTES, []
        for path in self._files():
            if path.name.startswith(self._prefix) and room > 0:
                try:
                    with path.open("rb") as file:
                        contents.append(file.read(2 * FILE_BYTES))
                except OSError as error:
                    log.warning("prefix cache: cannot read %s (%s)", path, error.strerror)
                else:
                    room -= len(contents[-1])
        for content in reversed(contents):
            yield from _records(content)

    def append(self, client: str, key: int, written: Written) -> None:
        """Store a record soon."""
        if len(client) > _LONGEST_NAME:
            return
        if not self._started:
            self._started = True
            self._thread.start()
        with suppress(queue.Full):
            self._queue.put_nowait((client, key, written))

    def close(self) -> None:
        """Store what is waiting."""
        if self._started:
            self._queue.put(None)
            self._thread.join()

    def _write(self) -> None:
        file, size = None, FILE_BYTES
        try:
            while (record := self._queue.get()) is not None:
                data = _packed(*record)
                if file is None or size + len(data) > FILE_BYTES:
                    if file is not None:
                        file.close()
                    file, size = self._next_file(), len(_MAGIC)
                file.write(data)
                file.flush()
                size += len(data)
        except OSError as error:
            log.warning("prefix cache: cannot store answers in %s (%s)", self._root, error.strerror)
            while self._queue.get() is not None:
                pass
        finally:
            if file is not None:
                with suppress(OSError):
                    file.close()

    def _next_file(self) -> BinaryIO:
        """Begin a file, and remove the oldest ones beyond the limit. Raises OSError."""
        room = DIRECTORY_BYTES - FILE_BYTES
        for path in self._files():
            with suppress(OSError):
                room -= max(path.stat().st_size, FILE_BYTES // 16)  # which bounds their number, too
                if room < 0:
                    path.unlink()
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may have been removed
        path = self._root / f"{self._prefix}{uuid4().hex}{_SUFFIX}"
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        file.write(_MAGIC)
        return file

    def _files(self) -> list[Path]:
        """The files of all models, the newest first."""
        found = []
        with suppress(OSError):  # the directory is gone
            for entry in os.scandir(self._root):
                if entry.name.endswith(_SUFFIX) and entry.is_file(follow_symlinks=False):
                    found.append((entry.stat().st_mtime_ns, entry.path))
        return [Path(path) for _, path in sorted(found, reverse=True)]


def _packed(client: str, key: int, written: Written) -> bytes:
    name = client.encode("utf-8", "surrogatepass")
    body = name + written.tokens.tobytes()
    sizes = written.prompt, len(written.tokens), len(name)
    head = _RECORD.pack(0, key, written.opening, *sizes)
    return _RECORD.pack(_checksum(head, body), key, written.opening, *sizes) + body


def _records(content: bytes) -> Iterator[Record]:
    """The records of a file up to the first that is damaged."""
    at = len(_MAGIC)
    if not content.startswith(_MAGIC):
        return
    while at + _RECORD.size <= len(content):
        checksum, key, opening, prompt, count, named = _RECORD.unpack_from(content, at)
        begin = at + _RECORD.size
        at = begin + named + 4 * count
        head, body = bytes(8) + content[begin - _RECORD.size + 8 : begin], content[begin:at]
        if at > len(content) or prompt > count or _checksum(head, body) != checksum:
            return
        try:
            client = body[:named].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return
        yield client, key, Written(opening, prompt, array("I", body[named:]))


def _checksum(head: bytes, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(body, xxhash.xxh3_64_intdigest(head))
