"""The tiny model served on a real socket."""

from tests.server.conftest import client, tiny

__all__ = ["client", "tiny"]
