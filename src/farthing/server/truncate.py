"""Drops the oldest turns of a conversation until it fits the model's context."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from farthing.conversation.types import Conversation, Turn

T = TypeVar("T")
_FIXED = ("system", "developer")


def droppable(turns: tuple[Turn, ...]) -> list[tuple[int, int]]:
    """Ranges of turns that may be dropped, oldest first: requests, and answers with the results of their
    calls. Instructions, the last request and the last turns are kept."""
    starts = [
        at
        for at, turn in enumerate(turns)
        if turn.role in ("user", "assistant") or (turn.role in _FIXED and at and turns[at - 1].role == "tool")
    ]
    ranges = list(pairwise([*starts, len(turns)]))
    requests = [at for at, turn in enumerate(turns) if turn.role == "user"]
    kept = {*requests[-1:], *starts[-1:]}
    return [(start, end) for start, end in ranges if start not in kept and turns[start].role not in _FIXED]


def without(conversation: Conversation, dropped: list[tuple[int, int]]) -> Conversation:
    """A conversation without the turns in these ranges, except instructions."""
    gone = {at for start, end in dropped for at in range(start, end)}
    turns = tuple(turn for at, turn in enumerate(conversation.turns) if at not in gone or turn.role in _FIXED)
    return replace(conversation, turns=turns)


async def fitting(
    conversation: Conversation, attempt: Callable[[Conversation], Awaitable[T | None]]
) -> T | None:
    """The result for as much of a conversation as fits; None if nothing does.

    attempt: returns None if the prompt is too long. Bisection renders a long conversation only a few times.
    """
    result = await attempt(conversation)
    ranges = droppable(conversation.turns)
    if result is not None or not ranges:
        return result
    result = await attempt(without(conversation, ranges))
    low, high = 1, len(ranges)  # dropping `high` ranges is enough, if any number is
    while result is not None and low < high:
        middle = (low + high) // 2
        found = await attempt(without(conversation, ranges[:middle]))
        if found is None:
            low = middle + 1
        else:
            result, high = found, middle
    return result
