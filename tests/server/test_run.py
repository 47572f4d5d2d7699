"""Log lines that a client can cause are bounded."""

from __future__ import annotations

import asyncio
import ctypes
import logging
from types import SimpleNamespace

import pytest

from farthing.server import run as module
from farthing.server.run import MOST, PERIOD, LogLimit, Trimmer, keep_trimmed, resident


@pytest.fixture
def lines() -> list[str]:
    return []


def limited(lines: list[str], clock: list[float]) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addFilter(LogLimit(lambda: clock[0]))
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    return logger


def test_repeated_message_is_logged_a_few_times_and_then_counted(lines: list[str]) -> None:
    clock = [0.0]
    logger = limited(lines, clock)
    for _ in range(1000):
        logger.warning("Invalid HTTP request received.")
    logger.warning("something else: %d", 1)
    assert lines == ["Invalid HTTP request received."] * MOST + ["something else: 1"]
    clock[0] = PERIOD
    logger.warning("Invalid HTTP request received.")
    logger.warning("Invalid HTTP request received.")
    assert lines[-2:] == [
        f"Invalid HTTP request received. ({1000 - MOST} more were not logged)",
        "Invalid HTTP request received.",
    ]


def test_cancelled_request_is_not_an_error(lines: list[str]) -> None:
    logger = limited(lines, [0.0])
    for error in (asyncio.CancelledError("shutdown"), ValueError("bug")):
        try:
            raise error
        except BaseException:
            logger.exception("Exception in ASGI application")
    assert len(lines) == 1


def test_messages_that_are_all_different_take_bounded_memory(lines: list[str]) -> None:
    logger = limited(lines, [0.0])
    for i in range(10_000):
        logger.warning(f"message {i}")
    counts = logger.filters[0]._counts  # type: ignore[union-attr]
    assert len(lines) == 10_000 and len(counts) < 100


def test_trims_after_growth_only() -> None:
    sizes = iter([100, 90, 94, 95, 110, 92, 93])
    trims: list[None] = []
    trimmer = Trimmer(lambda: trims.append(None), lambda: next(sizes))
    trimmer.check()  # 100, trimmed to 90
    assert len(trims) == 1
    trimmer.check()  # 94
    assert len(trims) == 1
    trimmer.check()  # 95 is more than 5 %: trimmed to 110, which is in use
    assert len(trims) == 2
    trimmer.check()  # 92
    trimmer.check()  # 93
    assert len(trims) == 2


@pytest.mark.parametrize(("pause", "looked"), [(3600.0, False), (0.001, True)])
def test_the_size_is_looked_at_after_each_pause(
    monkeypatch: pytest.MonkeyPatch, pause: float, looked: bool
) -> None:
    checks: list[None] = []
    monkeypatch.setattr(module, "_SECONDS", pause)
    monkeypatch.setattr(module, "resident", lambda: 1)
    monkeypatch.setattr(module, "Trimmer", lambda trim: SimpleNamespace(check=lambda: checks.append(None)))
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(malloc_trim=print))

    async def run() -> None:
        trimming = asyncio.create_task(keep_trimmed())
        while looked and not checks:
            await asyncio.sleep(0.001)
        for _ in range(5):
            await asyncio.sleep(0.002)
        trimming.cancel()

    asyncio.run(run())
    assert bool(checks) == looked


def test_freed_chunks_between_live_ones_are_returned() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("this C library cannot trim")
    chunks = [b"x" * (65_536 + place) for place in range(1024)]
    kept = [chunk for place, chunk in enumerate(chunks) if place % 16 == 0]
    full = resident()
    del chunks
    Trimmer(lambda: trim(0)).check()
    assert len(kept) == 64
    assert resident() < full - 30 * 2**20
