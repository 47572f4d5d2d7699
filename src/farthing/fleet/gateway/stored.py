"""Finds the replica that stores a response of /v1/responses.

The replicas are asked. Every gateway of a fleet finds a response that way, also after a restart.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import aiohttp

from farthing.fleet.gateway.replicas import Replica

_PATH = re.compile(r"/v1/responses/(?!input_tokens\b|compact\b)([^/?]+)")
_LONGEST = 128  # characters of an id
_PASSED = ("Authorization", "X-Api-Key")
_TIMEOUT = aiohttp.ClientTimeout(total=1.0)


def named(target: str) -> str | None:
    """The id of a response in a request's target, as it is written there; None if there is none."""
    found = _PATH.match(target)
    return found[1] if found is not None else None


async def find(
    session: aiohttp.ClientSession, replicas: Sequence[Replica], identity: str, headers: Mapping[str, str]
) -> Replica | None:
    """The replica that answers for a response, with the credentials in `headers`; None if none does."""
    if len(identity) > _LONGEST:
        return None
    passed = {name: headers[name] for name in _PASSED if name in headers}
    path = f"/v1/responses/{quote(identity, safe='%')}"

    async def stores(replica: Replica) -> bool:
        try:
            request = session.get(replica.url + path, headers=passed, timeout=_TIMEOUT, allow_redirects=False)
            async with request as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    found = await asyncio.gather(*map(stores, replicas))
    return next((replica for replica, has in zip(replicas, found, strict=True) if has), None)
