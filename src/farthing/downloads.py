"""Receive files over lines that break: what has arrived is kept, and the rest is asked for.

The hub's library keeps pieces of 10 MiB alone, and gives up after five answers that end early: on a line that
breaks every 9 MB no weight file ever arrives.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, TypeVar

log = logging.getLogger(__name__)
PATIENCE = 8  # attempts in a row that bring nothing, before the last one's error is raised
PAUSE = 1.0  # seconds after the first of them, and twice as long after each further one
LONGEST_PAUSE = 30.0  # seconds
LONGEST_WAIT = 600.0  # seconds that a hub may ask to wait
SILENCE = 30.0  # seconds without a byte, after which a connection is given up
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_T = TypeVar("_T")


class Refused(OSError):
    """What a hub sends is not what it should be; asking again does not help."""


def patiently(request: Callable[[], _T], name: str, first: bool = False) -> _T:
    """The result of a request, which is sent again while the hub is busy or the line is broken. name: of what
    is requested, for the log; first: nothing was heard of the hub yet, so that without a connection there may
    be no network, which is said at once."""
    failures = 0
    while True:
        try:
            return request()
        except Exception as error:
            if first and _is_without_connection(error):
                raise
            failures += 1
            _rest(error, failures, name)


def receive(url: str, file: BinaryIO, size: int | None, most: int, name: str, part: bool = False) -> None:
    """Append to `file` what it lacks of the content at `url`.

    size: bytes of all of it, None where the hub does not say; most: bytes that are accepted. part: only the
    first `size` bytes are wanted, of more. Raises Refused for more bytes than that, or the last error once
    several attempts in a row have brought nothing.
    """
    failures, furthest = 0, file.tell()
    while size is None or file.tell() < size:
        problem: Exception = ConnectionError(f"the answer ended after {file.tell()} bytes; expected {size}")
        try:
            _append(url, file, size, most, part)
            if size is None:
                return
        except Refused:
            raise
        except Exception as error:
            problem = error
        if file.tell() > furthest:
            failures, furthest = 0, file.tell()
        elif size is None or file.tell() < size:
            failures += 1
            _rest(problem, failures, name)


def _append(url: str, file: BinaryIO, size: int | None, most: int, part: bool) -> None:
    """One answer, up to where it ends or breaks."""
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    have = file.tell()
    # Bytes are counted as they are stored: an encoded answer could not be continued.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if have or part:
        headers["Range"] = f"bytes={have}-{size - 1 if part and size else ''}"
    with get_session().stream("GET", url, headers=headers, timeout=SILENCE) as answer:
        if answer.status_code == 416:  # the content is shorter than what is here
            _empty(file)
            return
        hf_raise_for_status(answer)
        if have and not _continues(answer, have):
            _empty(file)
            if answer.status_code == 206:
                return
        for data in answer.iter_bytes():
            if part and size is not None:
                data = data[: size - file.tell()]
            if file.tell() + len(data) > most:
                raise Refused(f"the hub sends more than the {most} bytes that it said")
            file.write(data)
            if part and file.tell() == size:
                return


def _continues(answer: Any, have: int) -> bool:
    """Whether an answer begins with the byte that was asked for, in its stored form."""
    begins = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    return answer.status_code == 206 and begins and not answer.headers.get("Content-Encoding")


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _rest(problem: Exception, failures: int, name: str) -> None:
    """Wait before another attempt; raises the problem if there should be none."""
    answer = getattr(problem, "response", None)
    status = getattr(answer, "status_code", None)
    if failures >= PATIENCE or not (status in _BUSY or _is_of_the_line(problem)):
        raise problem
    pause = min(PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
    asked = _asked(answer) if status in _BUSY else None
    if asked is not None and asked > LONGEST_WAIT:
        raise OSError(f"the hub is busy (status {status}), and asks to wait {asked / 60:.0f} minutes")
    pause = max(pause, asked or 0.0)
    log.warning("%s: %s; trying again in %.0f s", name, _said(problem, status), pause)
    time.sleep(pause)


def _is_of_the_line(problem: Exception) -> bool:
    """Whether an error is one of the connection. Clients differ between versions of the hub's library."""
    of_client = type(problem).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
    return isinstance(problem, ConnectionError | TimeoutError) or of_client


def _is_without_connection(problem: Exception) -> bool:
    """Classes of these errors differ between versions of the hub's library, too."""
    return type(problem).__name__ in ("ConnectError", "ConnectTimeout", "OfflineModeIsEnabled")


def _asked(answer: Any) -> float | None:
    """The seconds in an answer's Retry-After, which may be a date."""
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return None


def _said(problem: Exception, status: int | None) -> str:
    if status is not None:
        return f"the hub answers {status}"
    return f"{type(problem).__name__}: {problem}".partition("\n")[0].rstrip(".")
