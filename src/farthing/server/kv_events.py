"""Publishes which blocks the prefix cache holds, as vLLM does: MessagePack over a ZeroMQ PUB socket.

The routers of llm-d and Dynamo subscribe to it. A message has three frames: a topic (empty), its number in 8
bytes, big-endian, and [time, [event, ...]], where an event is

    ["BlockStored", [hash], parent hash or nil, [token, ...], block size, LoRA id (nil)]
    ["BlockRemoved", [hash]]
    ["AllBlocksCleared"]

Hashes are 64-bit numbers. Blocks that are read from disk are not announced. Events contain prompts, so the
socket belongs on a network of its own, or on the loopback address.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgpack
import zmq

if TYPE_CHECKING:
    from farthing.engine.engine import Engine

_EVERY_S = 0.02  # between messages
_MOST = 1 << 16  # events kept for a message


class KvEvents:
    """Collects events in the engine's thread, and sends them in one of its own."""

    def __init__(self, endpoint: str) -> None:
        """Raises ValueError unless `endpoint` can be bound."""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as problem:
            self._socket.close(linger=0)
            expected = "an endpoint such as tcp://127.0.0.1:5557"
            raise ValueError(f"kv_events: got {endpoint!r}; expected {expected}: {problem}") from problem
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._events: deque[list[Any]] = deque(maxlen=_MOST)
        self._block_size, self._number = 0, 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send, name="kv-events", daemon=True)
        self._thread.start()

    def follow(self, engine: Engine) -> None:
        """Listen to an engine's prefix cache."""
        self._block_size = engine.config.block_size
        engine.between_steps(lambda core: setattr(core.scheduler.prefix, "listener", self)).result()

    def stored(self, digests: Sequence[bytes], parent: bytes | None, tokens: Sequence[int]) -> None:
        before = None if parent is None else _number(parent)
        hashes = [_number(digest) for digest in digests]
        self._events.append(["BlockStored", hashes, before, list(tokens), self._block_size, None])

    def removed(self, digest: bytes) -> None:
        self._events.append(["BlockRemoved", [_number(digest)]])

    def cleared(self) -> None:
        self._events.append(["AllBlocksCleared"])

    def close(self) -> None:
        """Send what is left, and close the socket."""
        self._closing.set()
        self._thread.join()
        self._socket.close(linger=0)

    def _send(self) -> None:
        last = False
        while not last:
            last = self._closing.wait(_EVERY_S)
            events = [self._events.popleft() for _ in range(len(self._events))]
            if events:
                payload = msgpack.packb([time.time(), events])
                self._socket.send_multipart([b"", self._number.to_bytes(8, "big"), payload])
                self._number += 1


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
