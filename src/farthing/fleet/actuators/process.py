"""Child processes in their own group, which end when the parent ends."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

_LOG = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Runs in the child before exec: SIGTERM when the parent ends, even by SIGKILL (Linux prctl(2); no-op
    elsewhere).
    """
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


async def launch(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    pass_fds: Sequence[int] = (),
    stdin: int = asyncio.subprocess.DEVNULL,
) -> asyncio.subprocess.Process:
    """Start a command with its output in `log`, or discarded if the disk is full.

    Raises OSError if it cannot be started.
    """
    with _opened(log) as output:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=stdin,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=_die_with_parent,
            pass_fds=tuple(pass_fds),
        )


def _opened(log: Path) -> BinaryIO:
    try:
        return log.open("ab")
    except OSError as problem:
        _LOG.warning("%s cannot be written (%s); its output is discarded", log, problem.strerror)
        return Path(os.devnull).open("ab")


def signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal to a child's whole group; ignores a group that is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def last_lines(log: Path, lines: int = 5) -> str:
    """The last lines of a log for an error message, or an empty string."""
    try:
        text = log.read_text(errors="replace").strip().splitlines()[-lines:]
    except OSError:
        return ""
    return "; last lines: " + " | ".join(text) if text else ""
