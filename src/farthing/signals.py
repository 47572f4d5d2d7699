"""Handling of a server's termination signals in child processes."""

from __future__ import annotations

import signal


def leave_to_parent() -> None:
    """Ignore SIGINT and SIGTERM, which terminals and service managers send to the whole process group.

    The parent first drains its requests and then terminates this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
