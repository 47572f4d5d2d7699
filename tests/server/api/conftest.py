"""The tiny model behind a real socket."""

from tests.server.conftest import client, tiny

__all__ = ["client", "tiny"]
