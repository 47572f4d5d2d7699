"""`GET /cache/digest`: the prompts in the prefix cache and the load, for gateways.

With the digest one can test guesses at cached prompts, so it requires permission to read all metrics.
"""

from __future__ import annotations

import base64
import struct
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from farthing.prompts import BLOCK
from farthing.server.errors import ApiError
from farthing.server.service import Service


def mount(api: FastAPI, service: Service) -> None:
    """Add the route."""

    @api.get("/cache/digest", summary="Blocks of prompt text in the prefix cache, for gateways")
    async def digest(request: Request) -> Response:
        if not request.scope["viewer"].everything:
            raise ApiError(403, "the cache digest is for metrics and admin keys", code="forbidden")
        return JSONResponse(await document(service))


async def document(service: Service) -> dict[str, Any]:
    """The digest: `blocks` are 64-bit little-endian integers in base64, of `block` bytes of text each."""
    engine = service.require_engine()
    blocks = await service.cache_digest.blocks(engine)
    snapshot = engine.stats.snapshot()
    return {
        "block": BLOCK,
        "blocks": base64.b64encode(struct.pack(f"<{len(blocks)}Q", *blocks)).decode(),
        "requests": snapshot.num_requests_running + snapshot.num_requests_waiting,
        "waiting_bytes": round(snapshot.num_requests_waiting * service.cache_digest.mean_bytes),
    }
