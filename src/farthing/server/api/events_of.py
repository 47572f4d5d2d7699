"""The events of a turn with one answer, for APIs whose streams are a sequence of named events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from farthing.conversation.deltas import Delta
from farthing.server.turns import Turn, Update


async def events_of(
    turn: Turn,
    opening: Callable[[], str],
    delta: Callable[[Delta], Sequence[str]],
    end: Callable[[Update], Sequence[str]],
) -> AsyncIterator[str]:
    """Yield SSE events, one string per engine output. opening: empty if those events were sent."""
    async for updates in turn.updates():
        (update,) = updates
        events = [opening()]
        for each in update.deltas:
            events += delta(each)
        if update.finish is not None:
            events += end(update)
        if text := "".join(events):
            yield text
