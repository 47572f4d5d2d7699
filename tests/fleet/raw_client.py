"""Bytes to a gateway over a socket, as no HTTP client would send them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from farthing.server.config import KeyRing
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.server import Gateway
from tests.fleet.doubles.replica import FakeReplica

HOST = b"host: localhost\r\n"
KEY = b"authorization: Bearer secret\r\n"


def post(payload: bytes, *fields: bytes) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\n" + HOST
    return head + b"".join(fields) + b"content-length: %d\r\n\r\n" % len(payload) + payload


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """(status, body) of one answer with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


@asynccontextmanager
async def keyed(config: GatewayConfig | None = None) -> AsyncIterator[tuple[Gateway, FakeReplica, int]]:
    """A gateway that requires the key "secret", with one replica."""
    async with FakeReplica(name="r") as replica:
        gateway = Gateway(config or GatewayConfig(health_interval_s=0.05), keys=KeyRing(["me:secret"]))
        port = await gateway.start()
        gateway.set_replicas({"r": replica.url})
        while not gateway.balancer.candidates():
            await asyncio.sleep(0.01)
        try:
            yield gateway, replica, port
        finally:
            await gateway.stop(0)
