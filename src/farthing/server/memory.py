"""What the server remembers between requests: exact tokens of earlier turns, and stored responses."""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from farthing.conversation.types import Answer, Turn
from farthing.files import json_size
from farthing.shares import Shares

# Exact tokens of earlier turns, so that a conversation's prompt begins with tokens in the prefix cache.
#
# Clients send the model's answers back as text, which may be tokenized differently: sampled text is not
# always split as the tokenizer splits it, arguments are serialized again, and white space is dropped. The
# prefix cache would then end at the first difference, and a long history would be recomputed. So the
# tokens of each answer are stored with the prompt before them, and a later prompt that continues both
# reuses them.

MAX_TOKENS = 8 << 20  # tokens stored in total, 4 bytes each
_SHORT = 65_536  # characters of one answer's arguments; longer ones must come back as they were sent
_SAME = 8  # stored answers of equal text, from different conversations


@dataclass(frozen=True, slots=True)
class Remembered:
    """An answer: the digest and length of the prompt's text, the tokens of both, and the reasoning."""

    digest: bytes
    characters: int
    tokens: array[int]
    reasoning: str
    ended: bool  # by an end token; False: the answer was truncated, or a grammar ended it

    def precedes(self, prompt: str) -> bool:
        """Whether a prompt begins with the text before this answer."""
        return len(prompt) >= self.characters and _digest(prompt[: self.characters]) == self.digest


class AnswerMemory:
    """Answers by client and content. Evicts the least recently used answer of the client that has most."""

    def __init__(self, tokens: int = MAX_TOKENS) -> None:
        self._room, self._used = tokens, 0
        self._shares = Shares(tokens)
        self._kept: dict[str, OrderedDict[bytes, list[Remembered]]] = {}  # clients without any are absent

    def remember(
        self, client: str, prompt: str, tokens: Sequence[int], answer: Answer, ended: bool = True
    ) -> None:
        """tokens: of the prompt, the answer and, if `ended`, its end."""
        if len(tokens) > self._room:
            return
        key = _key(answer.text, tuple((name, text) for _, name, text in answer.calls))
        entry = Remembered(_digest(prompt), len(prompt), array("i", tokens), answer.reasoning.strip(), ended)
        kept = self._kept.setdefault(client, OrderedDict())
        entries = kept.setdefault(key, [])
        entries.append(entry)
        kept.move_to_end(key)
        self._count(client, len(tokens))
        while len(entries) > _SAME:
            self._count(client, -len(entries.pop(0).tokens))
        while self._used > self._room:
            greediest = self._shares.greediest(self._kept)
            _, oldest = self._kept[greediest].popitem(last=False)
            if not self._kept[greediest]:
                del self._kept[greediest]
            self._count(greediest, -sum(len(entry.tokens) for entry in oldest))

    def recall(self, client: str, turn: Turn, prompt: str) -> Remembered | None:
        """The answer with the content of `turn` whose preceding text begins `prompt`."""
        key = _key(turn.text, tuple((call.name, call.arguments) for call in turn.calls))
        kept = self._kept.get(client, OrderedDict())
        if key not in kept:
            return None
        kept.move_to_end(key)
        said = turn.reasoning.strip()
        for entry in reversed(kept[key]):
            if said in ("", entry.reasoning) and entry.precedes(prompt):
                return entry
        return None

    def _count(self, client: str, tokens: int) -> None:
        self._used += tokens
        self._shares.charge(client, tokens)


def _key(text: str, calls: tuple[tuple[str, str], ...]) -> bytes:
    short = sum(len(arguments) for _, arguments in calls) <= _SHORT
    said = [(name, _canonical(arguments) if short else arguments) for name, arguments in calls]
    return _digest(json.dumps([text.strip(), said]))


def _canonical(arguments: str) -> str:
    """Arguments independent of spacing and the order of keys."""
    try:
        return json.dumps(json.loads(arguments or "{}"), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# Answers of /v1/responses for later requests to continue: in memory, with a bounded share per key.

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


class ResponseStore:
    """Each key has its own share and evicts its own least recently used responses: no key reads, replaces or
    evicts another's. Responses of one conversation share their turns in memory, but each counts them."""

    def __init__(
        self, keys: int = 1, responses: int = MAX_RESPONSES, characters: int = MAX_CHARACTERS
    ) -> None:
        """keys: the number of distinct key names."""
        self._most = max(responses // keys, min(responses, _LEAST_RESPONSES))
        self._characters = Shares(max(characters // keys, min(characters, _LEAST_CHARACTERS)))
        self._shelves: dict[str, _Shelf] = {}

    def put(self, client: str, turns: tuple[Turn, ...], document: dict[str, Any]) -> None:
        """Store a response under its id."""
        size = sum(map(_size, turns)) + json_size(document, _PER_VALUE)
        if size > self._characters.limit:
            return
        identity, shelf = document["id"], self._shelves.setdefault(client, _Shelf())
        self.delete(client, identity)
        shelf.kept[identity] = Stored(turns, document, size)
        shelf.items |= {item["id"]: item for item in document.get("output", ())}
        self._characters.charge(client, size)
        while len(shelf.kept) > self._most or self._characters.room(client) < 0:
            self.delete(client, next(iter(shelf.kept)))

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
        stored = shelf.kept.pop(identity, None) if shelf is not None else None
        if shelf is None or stored is None:
            return False
        self._characters.charge(client, -stored.characters)
        for item in stored.document.get("output", ()):
            shelf.items.pop(item["id"], None)
        return True


def _size(turn: Turn) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in turn.calls)
    return len(turn.text) + len(turn.reasoning) + calls + _PER_VALUE
