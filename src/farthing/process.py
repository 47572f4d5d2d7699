"""What a process needs besides its work: start-up, files read ahead, event loop, signals, cache directory."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import mmap
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

# The time since this process was launched: since its start, or since a standby process got its command.

_IMPORTED = time.monotonic()
_begun: float | None = None  # monotonic


def begin() -> None:
    """Count from now: the wait of a standby process is no part of a replica's cold start."""
    global _begun
    _begun = time.monotonic()


def seconds() -> float:
    """Seconds since `begin`, else since the process started (where /proc is missing: since this import)."""
    if _begun is not None:
        return time.monotonic() - _begun
    with suppress(OSError, ValueError, IndexError, AttributeError):
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - _IMPORTED


def leave_to_parent() -> None:
    """Ignore SIGINT and SIGTERM, which terminals and service managers send to the whole process group.

    The parent first drains its requests and then terminates this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, which writes a token in about half the time; None if it is not installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def cache_dir() -> Path:
    """Farthing's directory below XDG_CACHE_HOME, or below ~/.cache.

    Raises RuntimeError if that variable is not set and there is no home directory.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "farthing"


Progress = Callable[[str, int, int], None]  # what is done, how much of it so far, and of how much


LINE_SECONDS = 10.0  # between lines of progress where stderr is no terminal


def unseen(what: str, done: int, total: int) -> None:
    """Progress that nothing shows."""


class Lines:
    """Progress as a line at once and then every few seconds, with the time left at the speed of this kind of
    work."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._printed, self._began = -LINE_SECONDS, 0.0
        self._first, self._total = 0, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if total != self._total:  # another kind of work
            self._began, self._first, self._total = now, done, total
        if now - self._printed < LINE_SECONDS or done >= total:
            return
        self._printed = now
        passed = done - self._first
        left = (now - self._began) * (total - done) / passed if passed > 0 else None
        said = "" if left is None else f", about {_duration(left)} left"
        self._say(f"{what}: {done / total:.0%}{said}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


log = logging.getLogger(__name__)

POPULATE_READ = 22  # MADV_POPULATE_READ
STEP = 32 << 20  # bytes
MOST = 0.5  # of the memory that is available: a larger file would evict its own pages


def page_in(path: Path) -> threading.Thread | None:
    """Start reading a file in a daemon thread; None if it is missing or too large.

    Pages are faulted in through a mapping that requests large ones, as `farthing.ops.cpu.packed` does; data
    that another way of reading cached would keep small pages. They are unmapped again at once, so that they
    do not count twice. Only Linux 5.14 and later do this; elsewhere nothing happens.
    """
    if not path.is_file() or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    if not 0 < path.stat().st_size <= MOST * _available():
        return None
    thread = threading.Thread(target=_read, args=(path,), name="page-in", daemon=True)
    thread.start()
    return thread


def _available() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE + _cached()


def _cached() -> int:
    """Bytes of the page cache, which gives way to new pages."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) << 10
    return 0


def _read(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        advise = ctypes.CDLL(None, use_errno=True).madvise  # unlike mmap.madvise, releases the GIL
        for at in range(0, len(memory), STEP):
            part = (ctypes.c_void_p(start + at), ctypes.c_size_t(min(STEP, len(memory) - at)))
            if advise(*part, POPULATE_READ):
                log.debug("reading %s ahead stopped: %s", path, os.strerror(ctypes.get_errno()))
                return
            advise(*part, mmap.MADV_DONTNEED)


THREADS = 4
LONGEST_LIST = 1 << 24  # bytes of a list
_MAPS = Path("/proc/self/maps")


def read_ahead(command: str) -> None:
    """Request the files that `remember` listed. Returns once they are requested, not read; without a list, a
    home directory or the system call nothing happens.

    Starting a server imports more than a thousand small files, and each read waits for the one before. With
    nothing in the page cache, requesting them together takes L576's first token from 2.4 to 2.0 s.
    """
    with suppress(OSError, RuntimeError):
        paths = _read_list(_list(command)).splitlines()
        threads = [Thread(target=_request, args=(paths[i::THREADS],), daemon=True) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def remember(command: str) -> None:
    """List the modules and libraries of this process for the command's next start."""
    from farthing.files import replace_text  # imports libraries, which `read_ahead` comes before

    text = "".join(f"{path}\n" for path in sorted(set(_loaded())))
    # In a container there may be no home directory, or none that can be written to.
    with suppress(OSError, RuntimeError, UnicodeError):
        file = _list(command)
        if _read_list(file) != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, text, durable=False)


def _list(command: str) -> Path:
    """The list of this installation, which may be one of several."""
    here = zlib.crc32(f"{sys.prefix} {sys.version} {__file__}".encode())  # hashlib would read 5 MB first
    return cache_dir() / "start" / f"{command}-{here:08x}.txt"


def _read_list(file: Path) -> str:
    """The text of a list; empty if there is none, or anything else by its name."""
    if not file.is_file() or file.stat().st_size > LONGEST_LIST:
        return ""
    return file.read_text(encoding="utf-8", errors="surrogateescape")


def _loaded() -> Iterator[str]:
    for module in list(sys.modules.values()):
        compiled = getattr(module, "__cached__", None) or getattr(module, "__file__", None)
        if isinstance(compiled, str) and Path(compiled).is_absolute():
            yield compiled
    if _MAPS.is_file():
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            _, slash, path = line.partition("/")
            if slash and (path.endswith(".so") or ".so." in path):
                yield slash + path


def _request(paths: Sequence[str]) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with suppress(OSError, ValueError):
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)
