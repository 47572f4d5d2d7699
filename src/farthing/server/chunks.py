"""How finely a client may cut a body: the same for the server and the gateway.

Each chunk costs as much as a few hundred bytes. A body may have MOST chunks, and more if they have at least
LEAST bytes on average.
"""

from __future__ import annotations

MOST, LEAST = 1_024, 64
TOO_FINE = f"expected chunks of at least {LEAST} bytes on average"


def too_fine(chunks: int, size: int) -> bool:
    """Whether a body of `size` bytes so far came in too many chunks."""
    return chunks > MOST + size // LEAST
