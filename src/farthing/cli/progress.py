"""Progress on stderr of long-running commands: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0  # between lines where stderr is no terminal


@contextmanager
def token_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; the yielded function advances it."""
    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def step_progress(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """Progress over named steps; the yielded function takes (name, done, total)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    with _bar(TaskProgressColumn()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _bar(count: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


class _Lines:
    """A line at once and then every few seconds, with the time left at the speed of this kind of work."""

    def __init__(self, console: Console) -> None:
        self._console = console
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
        self._console.print(f"{what}: {done / total:.0%}{said}", highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
