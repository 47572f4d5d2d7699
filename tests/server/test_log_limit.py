"""Log lines that a client can cause are bounded."""

from __future__ import annotations

import asyncio
import logging

import pytest

from farthing.server.log_limit import MOST, PERIOD, LogLimit


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
