"""Answers of /v1/responses that later requests continue: bounded, in memory, each key's own."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from farthing.conversation.types import Turn

MAX_RESPONSES = 4096
MAX_CHARACTERS = 64 << 20  # of all texts and documents together


@dataclass(frozen=True, slots=True)
class Stored:
    """A response: whose it is, the conversation up to it (instructions left out), and its document."""

    client: str
    turns: tuple[Turn, ...]
    document: dict[str, Any]
    characters: int


class ResponseStore:
    """Forgets what was used longest ago. Turns are shared between the responses of one conversation, but
    counted with each."""

    def __init__(self, responses: int = MAX_RESPONSES, characters: int = MAX_CHARACTERS) -> None:
        self._most, self._room = responses, characters
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._characters = 0

    def put(self, client: str, turns: tuple[Turn, ...], document: dict[str, Any]) -> None:
        """Keep a response under its id."""
        size = sum(map(_size, turns)) + _characters(document)
        if size > self._room:
            return
        self._kept[document["id"]] = Stored(client, turns, document, size)
        self._characters += size
        while len(self._kept) > self._most or self._characters > self._room:
            self._characters -= self._kept.popitem(last=False)[1].characters

    def get(self, client: str, identity: str) -> Stored | None:
        """A response of this client; None if it is unknown, forgotten or another's."""
        stored = self._kept.get(identity)
        if stored is None or stored.client != client:
            return None
        self._kept.move_to_end(identity)
        return stored

    def delete(self, client: str, identity: str) -> bool:
        """Forget a response; whether there was one."""
        stored = self.get(client, identity)
        if stored is not None:
            self._characters -= self._kept.pop(identity).characters
        return stored is not None


def _characters(document: Any) -> int:
    """Characters of all strings in a document, and 64 for each value: `metadata` and `tools` have no bound
    but the body's."""
    size, stack = 0, [document]
    while stack:
        item = stack.pop()
        size += 64
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            size += sum(map(len, item))
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return size


def _size(turn: Turn) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in turn.calls)
    return len(turn.text) + len(turn.reasoning) + calls + 64
