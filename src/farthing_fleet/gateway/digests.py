"""Polls each replica for the contents of its prefix cache and its queue.

The format is that of `farthing.server.cache_digest`. A replica without this endpoint (vLLM, SGLang) is polled
again after a minute; the index then relies on the requests sent to it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import struct
from typing import Any

import aiohttp

from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.replicas import Balancer, Replica

log = logging.getLogger(__name__)

PATH = "/cache/digest"
_ABSENT_S = 60.0
_TIMEOUT_S = 2.0
_MAX_BYTES = 8 << 20


class Digests:
    """Polls every replica. key: bearer token for the replicas."""

    def __init__(self, config: GatewayConfig, balancer: Balancer, key: str | None = None) -> None:
        self._config, self._balancer = config, balancer
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._absent: dict[str, float] = {}  # url -> loop time of the next poll

    async def run(self) -> None:
        """Poll forever."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self._headers) as http:
            while True:
                replicas = [r for r in self._balancer.replicas.values() if r.healthy]
                if len(replicas) > 1:  # else there is nothing to choose
                    await asyncio.gather(*(self.read(http, replica) for replica in replicas))
                await asyncio.sleep(self._config.digest_interval_s)

    async def read(self, http: aiohttp.ClientSession, replica: Replica) -> None:
        """Read the digest of one replica. Without an answer the last one is kept."""
        now = asyncio.get_running_loop().time()
        if self._absent.get(replica.url, 0.0) > now:
            return
        try:
            async with http.get(replica.url + PATH) as answer:
                document = await _document(answer) if answer.status == 200 else None
            if document is None:
                self._absent[replica.url] = now + _ABSENT_S
                replica.report(0, 0.0)
                return
            blocks = parse(document, self._config.prefix_block)
            replica.report(int(document["requests"]), float(document["waiting_bytes"]))
        except (aiohttp.ClientError, OSError, TimeoutError):
            return
        except (ValueError, KeyError, TypeError) as problem:
            log.warning("replica %s: ignoring its cache digest: %r", replica.name, problem)
            self._absent[replica.url] = now + _ABSENT_S
            return
        self._balancer.prefixes.replace(replica.name, blocks)


async def _document(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The JSON object of an answer. Raises ValueError."""
    data = bytearray()
    async for part in answer.content.iter_any():
        data += part
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("not an object")
    return document


def parse(document: dict[str, Any], block: int) -> tuple[int, ...]:
    """The block hashes of a digest. Raises ValueError, KeyError or TypeError."""
    if document["block"] != block:
        raise ValueError(f"block: got {document['block']} bytes; expected {block}")
    try:
        data = base64.b64decode(document["blocks"], validate=True)
    except binascii.Error as problem:
        raise ValueError(str(problem)) from problem
    if len(data) % 8:
        raise ValueError(f"{len(data)} bytes of blocks; expected a multiple of 8")
    return struct.unpack(f"<{len(data) // 8}Q", data)
