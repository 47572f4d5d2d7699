"""A model's output as deltas: reasoning split from the answer, calls from text, forced calls from JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from farthing.conversation.base import MAX_HEAD, CallParser, Machine, Tags
from farthing.conversation.scan import MARK, JsonObject, SpecialTokens, Trailing, literals, plain
from farthing.conversation.types import CallStart, Delta, Reasoning, Text

# Splits a text into reasoning and answer by the tags around the reasoning, and counts its tokens.


class ReasoningSplitter:
    """Splits text into reasoning and answer, and drops the tags and the white space around them.

    Models write reasoning in three ways: with both tags, with the closing tag alone because the prompt ends
    with the opening one, or with no tag. They also repeat the prompt's tag, close twice, or reason again
    after a part of the answer.

    exact: the tags are special tokens here, so that each one is a tag. Otherwise a tag amid an answer's text
    is part of it, and only one before the text, or after a call, is a tag.
    """

    def __init__(self, tags: Tags, opened: bool, exact: bool = False) -> None:
        self._tags, self._opened, self._exact = tags, opened, exact
        self._both = literals(frozenset((tags.open, tags.close)))
        self._ends = self._both if exact else literals(frozenset((tags.close,)))
        self._buffer = ""
        # start: nothing but white space so far. edge: after a tag or a call.
        self._state: Literal["start", "reasoning", "edge", "content"] = "start"
        self._trailing = Trailing()
        self._begun = False  # some reasoning was sent
        self._blank: list[str] = []  # leading white space, kept if the output has no tags

    @property
    def reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning, as far as is known."""
        return self._state == "reasoning" or (self._state == "start" and self._opened)

    def push(self, text: str) -> list[Delta]:
        """Parse one more piece and return the deltas that are certain."""
        self._buffer += text
        found: list[Delta] = []
        steps = {"start": self._edge, "reasoning": self._reason, "edge": self._edge, "content": self._answer}
        while self._buffer and steps[self._state](found):
            pass
        return found

    def interrupt(self) -> list[Delta]:
        """A call begins here: the text before it is complete, and the reasoning may continue after it."""
        found = self._rest(self._buffer)
        self._buffer, self._blank = "", []
        self._state = "reasoning" if self.reasoning else "edge"
        return found

    def finish(self) -> list[Delta]:
        """The remaining text, which could have become a tag; dropped if it clearly was one."""
        rest = self._buffer if self._exact else self._both.unless_cut(self._buffer)
        if self._state == "start" and not self._opened:
            rest = "".join(self._blank) + rest
        self._buffer = ""
        return self._rest(rest)

    def _rest(self, rest: str) -> list[Delta]:
        if self.reasoning:
            rest = self._pass(rest)
            return [Reasoning(rest)] if rest else []
        return [Text(rest)] if rest else []

    # States: each returns whether it made progress.

    def _edge(self, found: list[Delta]) -> bool:
        self._skip_blanks()
        if self._buffer and self._at_tag():
            return True
        if self._waits():
            return False
        if self._state == "start" and not self._opened:
            self._buffer = "".join(self._blank) + self._buffer
        self._state = "reasoning" if self.reasoning else "content"
        return True

    def _reason(self, found: list[Delta]) -> bool:
        tag = self._ends.find(self._buffer)
        size = tag[0] if tag else self._ends.ready(self._buffer)
        if text := self._pass(self._buffer[:size]):
            found.append(Reasoning(text))
        self._buffer = self._buffer[size:]
        return tag is not None and self._at_tag()

    def _answer(self, found: list[Delta]) -> bool:
        tag, size = None, len(self._buffer)
        if self._exact:
            tag = self._both.find(self._buffer)
            size = tag[0] if tag else self._both.ready(self._buffer)
        if size:
            found.append(Text(self._buffer[:size]))
        self._buffer = self._buffer[size:]
        return tag is not None and self._at_tag()

    # Shared by the states.

    def _at_tag(self) -> bool:
        """Take a tag at the beginning of the buffer."""
        opens = self._buffer.startswith(self._tags.open)
        if not opens and not self._buffer.startswith(self._tags.close):
            return False
        self._buffer = self._buffer[len(self._tags.open if opens else self._tags.close) :]
        self._state = "reasoning" if opens else "edge"
        return True

    def _waits(self) -> bool:
        """Whether the buffer may still become a tag."""
        return self._tags.open.startswith(self._buffer) or self._tags.close.startswith(self._buffer)

    def _skip_blanks(self) -> None:
        text = self._buffer.lstrip()
        if self._state == "start" and len(text) < len(self._buffer):
            self._blank.append(self._buffer[: len(self._buffer) - len(text)])
        self._buffer = text

    def _pass(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
        text = self._trailing.push(text)
        self._begun = self._begun or bool(text)
        return text


class ReasoningCounter:
    """Counts the tokens between the reasoning tags, exactly, by token id: neither the tags nor calls.

    If a tag is not a single token, each piece that starts inside the reasoning counts in full.
    """

    def __init__(self, open_id: int | None, close_id: int | None, opened: bool) -> None:
        self._open, self._close = open_id, close_id
        self._inside = opened
        self.tokens = 0

    def push(self, tokens: Sequence[int], reasoning: bool, calling: bool) -> None:
        """Account for one piece of output. The flags are the parser's state before it."""
        if self._close is None:
            self.tokens += len(tokens) if reasoning else 0
            return
        if calling:
            return  # a tag in a call's arguments is no tag
        for token in tokens:
            if token == self._close:
                self._inside = False
            elif token == self._open:
                self._inside = True
            elif self._inside:
                self.tokens += 1


# Parses calls that a grammar forces: the JSON list of `calls_schema`, or one function's arguments.

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NAME = "name"  # any string in the sequence below
_HEADER = ("{", '"name"', ":", _NAME, ",", '"parameters"', ":")


class ListedCalls(Machine):
    """`[{"name": …, "parameters": {…}}, …]`. Anything else is passed on as text."""

    anywhere = False

    def __init__(self) -> None:
        super().__init__()
        self._state = self._before
        self._seen: list[str] = []  # before the first call: text if no call follows
        self._step = 0  # in _HEADER
        self._name = ""
        self._object = JsonObject()

    def finish(self) -> list[Delta]:
        """Pass on text that did not become a call. A call that was cut before its arguments is dropped."""
        if not self.calls and self._state == self._rest:
            text = "".join(self._seen) + self._buffer
            self._text(text if text.strip() else "")
        self._seen, self._buffer = [], ""
        return self._taken()

    def _before(self) -> bool:
        """Between calls: the list's bracket or a comma."""
        self._blanks()
        if not self._buffer:
            return False
        if self._buffer[0] not in "[,":
            self._state = self._rest
            return True
        self._keep(1)
        self._step, self._state = 0, self._header
        return True

    def _header(self) -> bool:
        self._blanks()
        if not self._buffer:
            return False
        if self._step == len(_HEADER):
            self._state = self._within if self._buffer[0] == "{" else self._rest
            if self._state == self._within:
                self._begin(self._name)
                self._object, self._seen = JsonObject(), []
            return True
        wanted = _HEADER[self._step]
        if wanted == _NAME:
            match = _STRING.match(self._buffer)
            if match is None:
                return self._give_up() if len(self._buffer) > MAX_HEAD or self._buffer[0] != '"' else False
            wanted = match[0]
            try:
                self._name = json.loads(wanted)
            except ValueError:
                return self._give_up()
            if not self._name.strip():
                return self._give_up()
        if self._buffer.startswith(wanted):
            self._keep(len(wanted))
            self._step += 1
            return True
        return False if wanted.startswith(self._buffer) else self._give_up()

    def _within(self) -> bool:
        end = self._object.push(self._buffer)
        self._arguments(self._take(len(self._buffer) if end < 0 else end))
        if end >= 0:
            self._state = self._after
        return True

    def _after(self) -> bool:
        self._blanks()
        if not self._buffer:
            return False
        self._state = self._before if self._take(1) == "}" else self._rest
        return True

    def _rest(self) -> bool:
        """Text after the list, or text that is not a list."""
        text = self._take(len(self._buffer))
        if not self.calls:
            self._seen.append(text)
        return True

    def _give_up(self) -> bool:
        self._state = self._rest
        return True

    def _keep(self, size: int) -> None:
        text = self._take(size)
        if not self.calls:
            self._seen.append(text)

    def _blanks(self) -> None:
        self._keep(len(self._buffer) - len(self._buffer.lstrip()))


class NamedCall(Machine):
    """One call of a known function: the whole text is its arguments."""

    anywhere = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self._function = name
        self._state = self._pass

    def finish(self) -> list[Delta]:
        """Nothing is ever held back."""
        return []

    def _pass(self) -> bool:
        if not self.calls:
            self._begin(self._function)
        self._arguments(self._take(len(self._buffer)))
        return True


# Parses a complete output: splits reasoning from the answer, and calls from text.

_SLICE = 4_096  # characters parsed at once: parsers copy what remains of their input at every tag


class OutputParser:
    """Converts pieces of text to deltas. The assembled answer does not depend on where the pieces are cut.

    tags: None if the output is not parsed for reasoning. opened: the prompt already opened it. tokens: the
    markup that the model writes as special tokens, each of which follows MARK; where the same text is spelled
    by other tokens, it is no markup.

    Calls are parsed first, because a call may begin inside the reasoning, and tags in its arguments are no
    tags. Only a forced call that is plain JSON follows the reasoning.
    """

    def __init__(
        self,
        calls: CallParser,
        tags: Tags | None = None,
        opened: bool = False,
        tokens: frozenset[str] = frozenset(),
    ) -> None:
        self._calls = calls
        self._tokens = SpecialTokens(tokens) if tokens else None
        self._splitter = None
        if tags is not None:
            self._splitter = ReasoningSplitter(tags, opened, exact=tags.close in tokens)

    @property
    def calls(self) -> int:
        """The number of calls begun so far."""
        return self._calls.calls

    @property
    def reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning, as far as is known."""
        if self._splitter is None:
            return self._calls.reasoning
        return self._splitter.reasoning and not self.calling

    @property
    def calling(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        return self._calls.anywhere and self._calls.inside

    def push(self, text: str, last: bool = False) -> list[Delta]:
        """Parse one more piece, perhaps the last one, and return the deltas that are certain."""
        deltas: list[Delta] = []
        for at in range(0, len(text), _SLICE):
            piece = text[at : at + _SLICE]
            deltas += self._parse(piece if self._tokens is None else self._tokens.push(piece))
        if self._tokens is not None:
            deltas = _plain(deltas)
        return [*deltas, *self.finish()] if last else deltas

    def finish(self) -> list[Delta]:
        """The deltas still held back at the end of the output."""
        deltas = self._parse(self._tokens.finish()) if self._tokens is not None else []
        if self._splitter is None:
            deltas += self._calls.finish()
        elif self._calls.anywhere:
            deltas += [*self._split(self._calls.finish()), *self._splitter.finish()]
        else:
            deltas += [*self._called(self._splitter.finish()), *self._calls.finish()]
        return _plain(deltas)

    def _parse(self, text: str) -> list[Delta]:
        if self._splitter is None:
            return self._calls.push(text)
        if self._calls.anywhere:
            return self._split(self._calls.push(text))
        return self._called(self._splitter.push(text))

    def _split(self, deltas: Iterable[Delta]) -> list[Delta]:
        """Split the text between calls."""
        assert self._splitter is not None
        found: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, Text):
                found += self._splitter.push(delta.text)
                continue
            if isinstance(delta, CallStart):
                found += self._splitter.interrupt()
            found.append(delta)
        return found

    def _called(self, deltas: Iterable[Delta]) -> list[Delta]:
        """Parse the calls of the answer."""
        found: list[Delta] = []
        for delta in deltas:
            found += self._calls.push(delta.text) if isinstance(delta, Text) else [delta]
        return found


class PlainParser:
    """Parses an output that holds neither reasoning nor calls: removes special tokens without a meaning.

    `OutputParser` would return the same. Nearly every piece has no mark, and passes unchanged.
    """

    calls = 0
    reasoning = calling = False

    def __init__(self, meaningless: frozenset[str] = frozenset()) -> None:
        """meaningless: special tokens that are not shown. Each follows MARK in the text."""
        self._tokens = meaningless
        self._buffer = ""

    def push(self, text: str, last: bool = False) -> list[Delta]:
        """Parse one more piece, perhaps the last one, and return the deltas that are certain."""
        text = self._buffer + text
        self._buffer = ""
        if MARK in text:
            text = self._shown(text, last)
        return [Text(text)] if text else []

    def _shown(self, text: str, last: bool) -> str:
        if self._tokens:
            marked = literals(frozenset(MARK + token for token in self._tokens))
            ready = len(text) if last else marked.ready(text)
            text, self._buffer = text[:ready], text[ready:]
            text = marked.replace(lambda token: "", text)
        return plain(text)


def _plain(deltas: list[Delta]) -> list[Delta]:
    shown: list[Delta] = []
    for delta in deltas:
        if isinstance(delta, CallStart):
            shown.append(replace(delta, name=plain(delta.name), id=plain(delta.id)))
        elif MARK not in delta.text:
            shown.append(delta)
        elif text := plain(delta.text):
            shown.append(replace(delta, text=text))
    return shown
