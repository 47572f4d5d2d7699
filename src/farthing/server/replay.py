"""Exact tokens of earlier turns, so that a conversation's prompt begins with tokens in the prefix cache.

Clients send the model's answers back as text, which may be tokenized differently: sampled text is not always
split as the tokenizer splits it, arguments are serialized again, and white space is dropped. The prefix cache
would then end at the first difference, and a long history would be recomputed. So the tokens of each answer
are stored with the prompt before them, and a later prompt that continues both reuses them.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from farthing.conversation.deltas import Answer
from farthing.conversation.types import Turn

MAX_TOKENS = 8 << 20  # tokens stored in total, 4 bytes each
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
    """Answers by client and content; evicts the least recently used."""

    def __init__(self, tokens: int = MAX_TOKENS) -> None:
        self._room, self._used = tokens, 0
        self._kept: OrderedDict[bytes, list[Remembered]] = OrderedDict()

    def remember(
        self, client: str, prompt: str, tokens: Sequence[int], answer: Answer, ended: bool = True
    ) -> None:
        """tokens: of the prompt, the answer and, if `ended`, its end."""
        if len(tokens) > self._room:
            return
        key = _key(client, answer.text, tuple((name, text) for _, name, text in answer.calls))
        entry = Remembered(_digest(prompt), len(prompt), array("i", tokens), answer.reasoning.strip(), ended)
        entries = self._kept.setdefault(key, [])
        entries.append(entry)
        self._kept.move_to_end(key)
        self._used += len(tokens)
        while len(entries) > _SAME:
            self._used -= len(entries.pop(0).tokens)
        while self._used > self._room:
            _, oldest = self._kept.popitem(last=False)
            self._used -= sum(len(entry.tokens) for entry in oldest)

    def recall(self, client: str, turn: Turn, prompt: str) -> Remembered | None:
        """The answer with the content of `turn` whose preceding text begins `prompt`."""
        key = _key(client, turn.text, tuple((call.name, call.arguments) for call in turn.calls))
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        said = turn.reasoning.strip()
        for entry in reversed(self._kept[key]):
            if said in ("", entry.reasoning) and entry.precedes(prompt):
                return entry
        return None


def _key(client: str, text: str, calls: tuple[tuple[str, str], ...]) -> bytes:
    content = [client, text.strip(), [(name, _canonical(arguments)) for name, arguments in calls]]
    return _digest(json.dumps(content))


def _canonical(arguments: str) -> str:
    """Arguments independent of spacing and the order of keys."""
    try:
        return json.dumps(json.loads(arguments or "{}"), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
