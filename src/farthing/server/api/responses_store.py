"""Answers of /v1/responses for later requests to continue: in memory, with a bounded share per key."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from farthing.conversation.types import Turn
from farthing.json_size import json_size

MAX_RESPONSES = 4096
MAX_CHARACTERS = 64 << 20  # of all texts and documents together, divided evenly among the keys
_PER_VALUE = 64  # characters that stand for the memory of a value or a turn
_LEAST_RESPONSES, _LEAST_CHARACTERS = 64, 1 << 20  # of one key, for any number of keys


@dataclass(frozen=True, slots=True)
class Stored:
    """A response: the conversation up to it, without instructions, and its document."""

    turns: tuple[Turn, ...]
    document: dict[str, Any]
    characters: int


@dataclass(slots=True)
class _Shelf:
    """The responses of one key, least recently used first."""

    kept: OrderedDict[str, Stored] = field(default_factory=OrderedDict)
    items: dict[str, dict[str, Any]] = field(default_factory=dict)  # of all stored answers, by id
    characters: int = 0

    def add(self, identity: str, stored: Stored) -> None:
        """Store a response and index its items."""
        self.kept[identity] = stored
        self.characters += stored.characters
        self.items |= {item["id"]: item for item in stored.document.get("output", ())}

    def drop(self, identity: str) -> bool:
        """Forget a response; whether there was one."""
        stored = self.kept.pop(identity, None)
        if stored is not None:
            self.characters -= stored.characters
            for item in stored.document.get("output", ()):
                self.items.pop(item["id"], None)
        return stored is not None


class ResponseStore:
    """Each key has its own share and evicts its own least recently used responses: no key reads, replaces or
    evicts another's. Responses of one conversation share their turns in memory, but each counts them."""

    def __init__(
        self, keys: int = 1, responses: int = MAX_RESPONSES, characters: int = MAX_CHARACTERS
    ) -> None:
        """keys: the number of distinct key names."""
        self._most = max(responses // keys, min(responses, _LEAST_RESPONSES))
        self._room = max(characters // keys, min(characters, _LEAST_CHARACTERS))
        self._shelves: dict[str, _Shelf] = {}

    def put(self, client: str, turns: tuple[Turn, ...], document: dict[str, Any]) -> None:
        """Store a response under its id."""
        size = sum(map(_size, turns)) + json_size(document, _PER_VALUE)
        if size > self._room:
            return
        shelf = self._shelves.setdefault(client, _Shelf())
        shelf.drop(document["id"])
        shelf.add(document["id"], Stored(turns, document, size))
        while len(shelf.kept) > self._most or shelf.characters > self._room:
            shelf.drop(next(iter(shelf.kept)))

    def get(self, client: str, identity: str) -> Stored | None:
        """A response of this client; None if it is unknown, evicted or another client's."""
        shelf = self._shelves.get(client)
        if shelf is None or identity not in shelf.kept:
            return None
        shelf.kept.move_to_end(identity)
        return shelf.kept[identity]

    def item(self, client: str, identity: str) -> dict[str, Any] | None:
        """An output item of one of this client's responses; None if it is unknown."""
        shelf = self._shelves.get(client)
        return None if shelf is None else shelf.items.get(identity)

    def delete(self, client: str, identity: str) -> bool:
        """Forget a response; whether there was one."""
        shelf = self._shelves.get(client)
        return shelf is not None and shelf.drop(identity)


def _size(turn: Turn) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in turn.calls)
    return len(turn.text) + len(turn.reasoning) + calls + _PER_VALUE
