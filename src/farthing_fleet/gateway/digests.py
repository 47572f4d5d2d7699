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

from farthing.exchange import ReplicaLost, Upstream
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.replicas import Balancer, Replica

log = logging.getLogger(__name__)

PATH = "/cache/digest"
_ABSENT_S = 60.0
_TIMEOUT_S = 2.0


class Digests:
    """Polls every replica. key: bearer token for the replicas."""

    def __init__(
        self, config: GatewayConfig, balancer: Balancer, upstream: Upstream, key: str | None = None
    ) -> None:
        self._config, self._balancer, self._upstream = config, balancer, upstream
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._absent: dict[str, float] = {}  # url -> loop time of the next poll

    async def run(self) -> None:
        """Poll forever."""
        while True:
            replicas = [r for r in self._balancer.replicas.values() if r.healthy]
            if len(replicas) > 1:  # else there is nothing to choose
                await asyncio.gather(*map(self.read, replicas))
            await asyncio.sleep(self._config.digest_interval_s)

    async def read(self, replica: Replica) -> None:
        """Read the digest of one replica. Without an answer the last one is kept."""
        now = asyncio.get_running_loop().time()
        if self._absent.get(replica.url, 0.0) > now:
            return
        try:
            status, body = await self._upstream.get(replica.url, PATH, self._headers, timeout=_TIMEOUT_S)
            if status != 200:
                self._absent[replica.url] = now + _ABSENT_S
                replica.report(0, 0.0)
                return
            document = json.loads(body)
            blocks = parse(document, self._config.prefix_block)
            replica.report(int(document["requests"]), float(document["waiting_bytes"]))
        except ReplicaLost:
            return
        except (ValueError, KeyError, TypeError) as problem:
            log.warning("replica %s: ignoring its cache digest: %r", replica.name, problem)
            self._absent[replica.url] = now + _ABSENT_S
            return
        self._balancer.prefixes.replace(replica.name, blocks)


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
