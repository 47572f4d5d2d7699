"""Matches tool results with the calls that they answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from farthing.conversation.types import Turn
from farthing.server.errors import ApiError
from farthing.server.fields import short

_LISTED = 8  # ids in an error


class IssuedCalls:
    """The ids of a conversation's calls so far. Each call takes one result; it may remain without one."""

    def __init__(self, earlier: Iterable[Turn] = ()) -> None:
        """earlier: turns that were checked before."""
        self._waiting: Counter[str] = Counter()  # calls without a result, in order
        self._known: set[str] = set()
        for turn in earlier:
            self.issue(turn)
            if turn.role == "tool":
                self._take(turn.call_id)

    def issue(self, turn: Turn) -> None:
        """Add the calls of a turn."""
        self._waiting.update(call.id for call in turn.calls)
        self._known.update(call.id for call in turn.calls)

    def answer(self, identity: str | None, field: str) -> None:
        """Match a result with its call; one without an id, with the earliest. Raises ApiError (400)."""
        if self._take(identity):
            return
        listed = [short(waiting) for waiting in self._waiting if waiting][:_LISTED]
        more = ", …" if len(self._waiting) > _LISTED else ""
        expected = f"expected the id of an earlier call without a result: {', '.join(listed)}{more}"
        got = "is missing" if identity is None else f"got {short(identity)}"
        got += ", whose call already has a result" if identity in self._known else ""
        why = expected if listed else "no earlier call is without a result"
        separator = " " if identity is None else ": "
        raise ApiError(400, f"{field}{separator}{got}; {why}", param=field, code="invalid_value")

    def _take(self, identity: str | None) -> bool:
        """Whether a call was waiting for a result with this id. It no longer is."""
        found = next(iter(self._waiting), None) if identity is None else identity
        if found is None or found not in self._waiting:
            return False
        self._waiting[found] -= 1
        if not self._waiting[found]:
            del self._waiting[found]
        return True
