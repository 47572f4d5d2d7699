"""Which host a request is for: the same rule for the server and the gateway.

A proxy in front may route, or check access, by one of the names while this server goes by another.
"""

from __future__ import annotations

from collections.abc import Iterable


def ambiguity(target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """What a head with contradicting hosts should have; None if it is clear. target: as received."""
    hosts = [value.lower() for name, value in headers if name.lower() == b"host"]
    if len(hosts) > 1:
        return "expected one Host header"
    authority = _authority(target)
    if authority is not None and authority.lower() not in hosts:
        return "expected a path, or a URL of the host in the Host header"
    return None


def _authority(target: bytes) -> bytes | None:
    """The host and port in a request's target; None if it is a path."""
    scheme, separator, rest = target.partition(b"://")
    if not separator or b"/" in scheme or b"?" in scheme:
        return None
    return rest.partition(b"?")[0].partition(b"/")[0]
