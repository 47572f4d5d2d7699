"""What the server remembers between requests: exact tokens of earlier answers, and stored responses."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import xxhash

from farthing.conversation.types import Turn
from farthing.files import json_size
from farthing.server.answer_log import AnswerLog, Written
from farthing.shares import Shares

if TYPE_CHECKING:
    from farthing.engine.tokenizer import Tokenizer

# Exact tokens of earlier answers, so that a conversation's next prompt begins with what is cached.
#
# Text does not determine tokens: a model does not always split its text as the tokenizer does. With the
# tokenizer's split the prefix cache would end at the first answer that differs, and a long history would be
# recomputed. So the tokens of each answer are stored under a digest of the tokens before it.
#
# A prompt is the tokenizer's split of what the template renders. Only the text between two control tokens may
# be split as the model split it, and only if both splits spell the same text. Whatever is stored, the model
# therefore reads the rendered prompt, with its control tokens where the template put them.

MAX_TOKENS = 8 << 20  # stored in total, 4 bytes each
_PER_ANSWER = 128  # tokens that stand for the memory of an entry
_SAME = 1024  # answers stored under one key
_COMPARED = 8  # of these, the newest that begin as a prompt does

# How an answer is continued: with the tokens that were sampled, or as another text than the model wrote.
Continued = Literal["sampled", "changed"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a conversation. key: of those up to `start`, where the text after the last control token
    begins; None: there is no control token, and the answer cannot be stored."""

    ids: list[int]
    tokenizer: Tokenizer | None = None
    key: int | None = None
    start: int = 0
    latest: Continued | None = None  # the last answer of this server in it


class AnswerMemory:
    """Answers by client and place. Evicts the least recently used answer of the client that has most. Used
    only in the event loop."""

    def __init__(self, tokens: int = MAX_TOKENS) -> None:
        self.continued: dict[Continued, int] = dict.fromkeys(get_args(Continued), 0)  # prompts submitted
        self._room, self._used = tokens, 0
        self._shares = Shares(tokens)
        self._kept: dict[str, OrderedDict[int, list[Written]]] = {}  # clients without any are absent
        self._log: AnswerLog | None = None

    def persist(self, folder: Path) -> None:
        """Load the answers that earlier processes stored for this folder of cached blocks, and store later
        ones for it."""
        self._log = AnswerLog(folder)
        for client, key, written in self._log.read():
            self._keep(client, key, written)

    def close(self) -> None:
        """Finish storing."""
        if self._log is not None:
            self._log.close()

    def remember(self, client: str, prompt: Prompt, answer: Sequence[int]) -> None:
        """answer: its tokens, including those with which the server made it begin."""
        tokenizer = prompt.tokenizer
        if prompt.key is None or tokenizer is None:
            return
        tail = prompt.ids[prompt.start :]
        tokens = [*tail, *answer]
        opening = tokenizer.spelled(tokens[: _end(tokens, 0, tokenizer)])
        if opening is None:
            return
        written = Written(xxhash.xxh3_64_intdigest(opening), len(tail), array("I", tokens))
        if self._keep(client, prompt.key, written) and self._log is not None:
            self._log.append(client, prompt.key, written)

    def prompt(self, client: str, ids: list[int], tokenizer: Tokenizer) -> Prompt:
        """A conversation that was just tokenized, with the sampled tokens of its answers."""
        kept = self._kept.get(client, OrderedDict())
        controls = tokenizer.control_ids
        parts: list[int] = []
        done = key = start = 0  # ids[:done] are in `parts`
        latest: Continued | None = None
        data = memoryview(array("I", ids)).cast("B")
        for after in [at + 1 for at, token in enumerate(ids) if token in controls]:
            key, start = xxhash.xxh3_64_intdigest(data[4 * start : 4 * after], key), after
            if after < done or key not in kept:
                continue
            kept.move_to_end(key)
            match = _match(ids, after, kept[key], tokenizer)
            parts += ids[done:after] + match.tokens
            done = match.end
            latest = "sampled" if match.whole else "changed" if match.changed else latest
        if not start:
            return Prompt(ids)
        parts += ids[done:]
        tail = next(at for at, token in enumerate(reversed(parts)) if token in controls)
        return Prompt(parts, tokenizer, key, len(parts) - tail, latest)

    def _keep(self, client: str, key: int, written: Written) -> bool:
        """Store an answer; False if it is too large, or the last one under its key."""
        size = len(written.tokens) + _PER_ANSWER
        if size > self._room:
            return False
        kept = self._kept.setdefault(client, OrderedDict())
        entries = kept.setdefault(key, [])
        kept.move_to_end(key)
        if entries and entries[-1] == written:
            return False
        entries.append(written)
        self._used += size
        self._shares.charge(client, size)
        while len(entries) > _SAME:
            self._drop(client, entries.pop(0))
        while self._used > self._room:
            greediest = self._shares.greediest(self._kept)
            _, oldest = self._kept[greediest].popitem(last=False)
            if not self._kept[greediest]:
                del self._kept[greediest]
            for entry in oldest:
                self._drop(greediest, entry)
        return True

    def _drop(self, client: str, written: Written) -> None:
        size = len(written.tokens) + _PER_ANSWER
        self._used -= size
        self._shares.charge(client, -size)


@dataclass(frozen=True, slots=True)
class _Match:
    """Sampled tokens for the ids of a prompt from a place up to `end`."""

    tokens: list[int]
    end: int
    whole: bool = False  # the answer's text is all there
    changed: bool = False  # an answer was given there, and it is not this one


def _match(ids: list[int], at: int, entries: list[Written], tokenizer: Tokenizer) -> _Match:
    """The longest match of the answers to the prompt that ends after ids[:at], which end a control token."""
    end = _end(ids, at, tokenizer)
    text = tokenizer.spelled(ids[at:end])
    if text is None:
        return _Match([], at)
    opening = xxhash.xxh3_64_intdigest(text)
    alike = [entry for entry in reversed(entries) if entry.opening == opening][:_COMPARED]
    found = [_compared(ids, at, entry.tokens.tolist(), tokenizer) for entry in alike]
    best = max(found, key=lambda match: (match.whole, match.end), default=_Match([], at))
    if best.whole:
        return best
    return replace(best, changed=_changed(text, entries[-_COMPARED:], end == len(ids), tokenizer))


def _changed(text: bytes, entries: list[Written], last: bool, tokenizer: Tokenizer) -> bool:
    """Whether a text continues the prompt of one of these answers otherwise than all of them. last: it ends
    the prompt, so it may be the opening of the next answer alone."""
    asked = False
    for entry in entries:
        # A token has at least one byte. Only as much of an answer is read as the client sent: it may be far
        # longer, and there may be answers at each place of a prompt.
        if entry.prompt > len(text):
            continue
        tokens = entry.tokens[: len(text) + 2].tolist()
        tail = tokenizer.spelled(tokens[: entry.prompt])
        end = _end(tokens, 0, tokenizer)
        said = tokenizer.spelled(tokens[:end])
        if tail is None or said is None or not text.startswith(tail):
            continue
        if text.startswith(said) and said != tail and end >= len(entry.tokens) - 1:
            return False  # the same text, but no control token follows it
        asked = asked or text != tail or not last
    return asked


def _compared(ids: list[int], at: int, tokens: list[int], tokenizer: Tokenizer) -> _Match:
    """The tokens of an answer up to the first text or control token that differs."""
    place = 0
    while True:
        end, stop = _end(ids, at, tokenizer), _end(tokens, place, tokenizer)
        if not _same(ids[at:end], tokens[place:stop], tokenizer):
            return _Match(tokens[:place], at)
        last = stop >= len(tokens) - 1  # at most the token that ends the turn follows
        if end == len(ids) or stop == len(tokens) or ids[end] != tokens[stop]:
            return _Match(tokens[:stop], end, whole=last)
        at, place = end + 1, stop + 1
        if place == len(tokens):
            return _Match(tokens, at, whole=True)


def _same(ids: list[int], tokens: list[int], tokenizer: Tokenizer) -> bool:
    """Whether both spell the same text."""
    if ids == tokens:
        return True
    text = tokenizer.spelled(ids)
    return text is not None and text == tokenizer.spelled(tokens)


def _end(ids: Sequence[int], at: int, tokenizer: Tokenizer) -> int:
    """Where the text that begins at a place ends: at a control token or the end."""
    controls = tokenizer.control_ids
    return next((place for place in range(at, len(ids)) if ids[place] in controls), len(ids))


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
