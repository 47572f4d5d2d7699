"""Incremental detokenization that never returns part of a character or of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from functools import lru_cache

from tokenizers.decoders import DecodeStream

from farthing.conversation.marks import MARK
from farthing.engine.tokenizer import Tokenizer


class Detokenizer:
    """Text of one sequence. The results of `push` and `flush` concatenate to the full decoded text."""

    __slots__ = ("_decoder", "_marked", "_skip", "_stream", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, marked: Collection[int] = ()
    ) -> None:
        """marked: tokens whose text follows MARK, and is not skipped even if they are special."""
        self._tokenizer, self._marked = tokenizer, marked
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = None if tokenizer.byte_level else DecodeStream(skip_special_tokens=skip_special_tokens)

    def push(self, token: int) -> str:
        """Characters completed by this token."""
        if token in self._marked:
            return self.flush() + MARK + self._tokenizer.token_text(token)
        if self._stream is not None:
            return self._stream.step(self._tokenizer.backend, token) or ""
        if token in self._skip:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The remainder at the end: U+FFFD for an incomplete character."""
        return "" if self._stream is not None else self._decoder.decode(b"", final=True)


class StopChecker:
    """Finds stop strings in a stream of text and holds back a possible beginning of one."""

    __slots__ = ("_begun", "_held", "_include", "_stops", "found")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._begun = [0] * len(self._stops)  # length of each stop string matched at the text's end
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """Text that is safe to emit. Unless `armed` (min_tokens), all text is, and nothing stops."""
        if not self._stops:
            return text
        new, text = text, self._held + text
        self._held = ""
        if not armed:
            self._begun = [0] * len(self._stops)
            return text
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            return text[: at + len(self.found)] if self._include else text[:at]
        begun = zip(self._stops, self._begun, strict=True)
        self._begun = [_begun(stop, count, new) for stop, count in begun]
        ready = len(text) - max(self._begun)
        self._held = text[ready:]
        return text[:ready]

    def flush(self) -> str:
        """The held-back text, which turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _begun(stop: str, count: int, text: str) -> int:
    """Length of the longest prefix of `stop` at the end of the text, given the length before `text`.

    `text` does not complete it. Knuth, Morris and Pratt 1977: linear in the text, whatever the strings.
    """
    borders = _borders(stop)
    for character in text:
        while count and stop[count] != character:
            count = borders[count - 1]
        count += stop[count] == character
    return count


@lru_cache(maxsize=1024)
def _borders(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`: the length of its longest proper border (the KMP failure function)."""
    borders = [0]
    for character in stop[1:]:
        count = borders[-1]
        while count and stop[count] != character:
            count = borders[count - 1]
        borders.append(count + (stop[count] == character))
    return tuple(borders)
