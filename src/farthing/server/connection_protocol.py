"""The protocol class of a server's connections: httptools if installed, else h11."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from farthing.server.connections import Connections, GuardedH11


def protocol(guard: Connections) -> Callable[..., asyncio.Protocol]:
    """The class that uvicorn instantiates per connection."""
    try:
        from farthing.server.connections_httptools import GuardedHttpTools
    except ImportError:
        return type("Protocol", (GuardedH11,), {"guard": guard})
    return type("Protocol", (GuardedHttpTools,), {"guard": guard})
