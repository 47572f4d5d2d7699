"""Checks on request bodies before parsing: size, arrival time, and number of values.

`json.loads` and pydantic hold the GIL, so a body of a million values would stall every stream for seconds.
`check` counts values and nesting with numpy, which releases the GIL: 8 MB take about 20 ms in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farthing.server.cache_digest import CacheDigest
from farthing.server.errors import ApiError, send_error
from farthing.server.jobs import CONNECTION
from farthing.server.schema import HEAVY
from farthing.server.stream import FairLock, Gate

MAX_DEPTH = 128
MAX_VALUES = 32_768  # values other than numbers
MAX_NUMBERS = 262_144  # numbers in lists, such as token ids
MAX_DIGITS = 640  # in a row, outside strings: Python reads and writes an integer in quadratic time
_LARGE = 65_536  # bytes; larger bodies are checked in a thread
_MANY = 1_024  # values; larger bodies, and those with more values, are parsed one at a time
# After parsing a heavy body, the event loop serves other requests for this many times as long.
_REST = 2.0
_NUMBERS = 8  # numbers take as long to parse as one other value


class Bodies:
    """ASGI middleware that rejects bodies larger than `max_bytes` (413; before reading if the length is
    declared), bodies that take longer than `timeout` seconds to arrive (408), and JSON with too many values
    (400)."""

    def __init__(
        self, app: ASGIApp, max_bytes: int, timeout: float, digest: CacheDigest | None = None
    ) -> None:
        """digest: learns the bodies while it is read."""
        self.app = app
        self._digest = digest
        self.max_bytes = max_bytes
        self.timeout = timeout
        self._lock, self._gate = FairLock(), Gate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request with its whole body as one message."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            await send_error(self._too_large(), scope, receive, send)
            return
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._gate.enter(scope["client_name"])
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(receive)
            await self._gate.enter(scope["client_name"])
            heavy = len(body) > _LARGE or not (_is_light(body) or check(body) <= _MANY)
            CONNECTION.set(receive)
            if self._digest is not None and self._digest.is_read:
                self._digest.keep(body)
        except ApiError as error:
            await send_error(error, scope, receive, send)
            return
        if heavy:
            await self._pass_heavy(body, scope, receive, send)
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _pass_heavy(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Check and parse one heavy body at a time, taking turns between clients. Afterwards the event loop
        serves other requests for twice as long as the body held it."""
        await self._lock.acquire(scope["client_name"])
        held = True

        def release(seconds: float = 0.0) -> None:
            nonlocal held
            if held:
                held = False
                asyncio.get_running_loop().call_later(_REST * seconds, self._lock.release)

        try:
            if len(body) > _LARGE:
                try:
                    await asyncio.to_thread(check, body)
                except ApiError as error:
                    await send_error(error, scope, receive, send)
                    return
            scope[HEAVY] = True
            replay = _replay(body, receive, release)
            del body  # so that only the application has a copy
            await self.app(scope, replay, send)
        finally:
            release()

    async def _read(self, receive: Receive) -> bytes:
        """Read the whole body, so that the application never waits for a slow client."""
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        break
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.timeout:g} s") from None
        return b"".join(chunks)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is too large; expected at most {self.max_bytes} bytes", code="request_too_large"
        )


def _is_light(body: bytes) -> bool:
    """Whether a body is so short that it need not be counted: no value or level is shorter than a byte."""
    return len(body) <= _MANY and body.count(b"[") + body.count(b"{") <= MAX_DEPTH and b"\0" not in body


def check(body: bytes) -> int:
    """The number of values in JSON, counting numbers for less. Raises ApiError (400) for too many values,
    levels or digits of a number, and for UTF-16 and UTF-32, which Python parses but which would be counted
    wrongly. Ignores other defects."""
    if b"\0" in body:
        raise ApiError(400, "the body contains zero bytes; expected JSON in UTF-8")
    if b"\\" in body:
        body = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    data = np.frombuffer(body, np.uint8)
    outside = np.cumsum(data == ord('"'), dtype=np.uint8) % 2 == 0  # wraparound keeps parity
    commas = (data == ord(",")) & outside
    folded = data | 0x20  # [ becomes {, and ] becomes }
    opens = (folded == ord("{")) & outside
    if _most_digits(data, outside) > MAX_DIGITS:
        raise ApiError(
            400, f"the body contains a number of more than {MAX_DIGITS} digits", code="invalid_value"
        )
    numbers = _between_numbers(data, commas)
    values = int(np.count_nonzero(commas)) - numbers + int(np.count_nonzero(opens))
    if values > MAX_VALUES or numbers > MAX_NUMBERS:
        raise ApiError(
            400,
            f"the body contains {values} values and {numbers} numbers; "
            f"expected at most {MAX_VALUES} and {MAX_NUMBERS}",
            code="too_many_values",
        )
    brackets = np.flatnonzero(opens | ((folded == ord("}")) & outside))
    depth = int(np.cumsum(np.where(opens[brackets], 1, -1)).max(initial=0))
    if depth > MAX_DEPTH:
        raise ApiError(
            400,
            f"the body is nested {depth} levels deep; expected at most {MAX_DEPTH}",
            code="nested_too_deeply",
        )
    return values + numbers // _NUMBERS


def _most_digits(data: NDArray[np.uint8], outside: NDArray[np.bool_]) -> int:
    """The length of the longest run of digits outside strings."""
    others = np.flatnonzero((data - ord("0") > 9) | ~outside)  # what is below "0" wraps around
    ends = np.concatenate(([-1], others, [len(data)]))
    return int(np.diff(ends).max()) - 1


def _between_numbers(data: NDArray[np.uint8], commas: NDArray[np.bool_]) -> int:
    """Number of commas between two digits, followed by at most one space."""
    if len(data) < 4:
        return 0
    digit = (data >= ord("0")) & (data <= ord("9"))
    follows = digit[2:-1] | ((data[2:-1] == ord(" ")) & digit[3:])
    return int(np.count_nonzero(commas[1:-2] & digit[:-3] & follows))


def _replay(body: bytes, receive: Receive, taken: Callable[[float], None] | None = None) -> Receive:
    """A `receive` that returns the body first. `taken` is called with the seconds that the application needed
    to parse it."""
    first: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal first
        if first is None:
            return await receive()
        message, first = first, None
        if taken is not None:
            # Runs after the application has parsed and prepared the request, when it awaits again.
            began = time.monotonic()
            asyncio.get_running_loop().call_soon(lambda: taken(time.monotonic() - began))
        return message

    return replay
