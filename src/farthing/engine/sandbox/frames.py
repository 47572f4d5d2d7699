"""Length-prefixed JSON over a socket: the parent never unpickles what a child sends."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

MAX_BYTES = 256 << 20  # of one frame
READY = "ready"  # a fork server's first frame, or else why it cannot start


def send(
    connection: socket.socket, document: Any, deadline: float | None = None, descriptor: int | None = None
) -> None:
    """Write one document, with an open file if one is given.

    Raises TimeoutError at the deadline (monotonic seconds), OSError on a dead peer.
    """
    data = json.dumps(document).encode()  # ASCII: a lone surrogate survives as an escape
    data = len(data).to_bytes(8, "little") + data
    _arm(connection, deadline)
    if descriptor is not None:
        data = data[socket.send_fds(connection, [data], [descriptor]) :]
    connection.sendall(data)


def receive(connection: socket.socket, deadline: float | None = None) -> Any:
    """Read one document. Raises EOFError when the peer has closed, TimeoutError, OSError, ValueError."""
    return _document(connection, _read(connection, 8, deadline), deadline)


def receive_with_descriptor(connection: socket.socket) -> tuple[Any, int | None]:
    """Read one document and the open file sent with it, if any. Raises EOFError, OSError, ValueError."""
    head, descriptors, *_ = socket.recv_fds(connection, 8, 1)
    if not head:
        raise EOFError
    head += _read(connection, 8 - len(head), None)
    return _document(connection, head, None), next(iter(descriptors), None)


def _document(connection: socket.socket, head: bytes | bytearray, deadline: float | None) -> Any:
    size = int.from_bytes(head, "little")
    if size > MAX_BYTES:
        raise ValueError(f"frame of {size} bytes; expected at most {MAX_BYTES}")
    return json.loads(_read(connection, size, deadline))


def _read(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray()
    while len(data) < size:
        _arm(connection, deadline)
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return data


def _arm(connection: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        connection.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)
