"""What child processes do with the signals that end a server."""

from __future__ import annotations

import signal


def leave_to_parent() -> None:
    """Ignore SIGINT and SIGTERM, which a terminal and a service manager send to every process of a group.

    The parent drains its requests first and then ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
