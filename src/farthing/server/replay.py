"""Exact tokens of earlier turns, so that a conversation's prompt begins with what the cache already holds.

A client sends back what the model said as text. Rendered and tokenized again it may become other tokens:
sampled text is not always split as the tokenizer would split it, arguments are serialized again, white space
is dropped. Then the prefix cache ends at the first difference, and a long history is computed again. So the
tokens of each answer are remembered with the prompt they followed; a later prompt that continues both uses
them.
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

MAX_TOKENS = 8 << 20  # remembered in all, 4 bytes each
_SAME = 8  # answers of the same text that are remembered, in different conversations


@dataclass(frozen=True, slots=True)
class Remembered:
    """An answer: the digest and length of the prompt's text, the tokens of both, and the reasoning."""

    digest: bytes
    characters: int
    tokens: array[int]
    reasoning: str
    ended: bool  # by its end token; else the token is missing: the answer was cut off, or a grammar ended it

    def precedes(self, prompt: str) -> bool:
        """Whether a prompt begins with the text this answer followed."""
        return len(prompt) >= self.characters and _digest(prompt[: self.characters]) == self.digest


class AnswerMemory:
    """Answers by client and content; forgets what was used longest ago."""

    def __init__(self, tokens: int = MAX_TOKENS) -> None:
        self._room, self._used = tokens, 0
        self._kept: OrderedDict[bytes, list[Remembered]] = OrderedDict()

    def remember(
        self, client: str, prompt: str, tokens: Sequence[int], answer: Answer, ended: bool = True
    ) -> None:
        """tokens: of the prompt and of the answer, and of its end where `ended`."""
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
        """The answer that `turn` is, given after a text that `prompt` begins with."""
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
    """Arguments whatever their spacing and the order of their keys."""
    try:
        return json.dumps(json.loads(arguments or "{}"), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
