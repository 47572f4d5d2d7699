"""Gemma 3's turns, and the answers of Gemma 4: thoughts in a channel, and calls in a notation of their own.

    <|channel>thought
    REASONING
    <channel|>ANSWER<|tool_call>call:NAME{KEY:<|"|>TEXT<|"|>,KEY:[1,true,{KEY:2.5}]}<tool_call|>

Keys and numbers are bare, and a token quotes texts, in which nothing is escaped.
"""

from __future__ import annotations

import json
import re

from farthing.conversation.base import (
    MAX_HEAD,
    CallFormat,
    ChatFormat,
    ControlTokens,
    FormatError,
    Machine,
)
from farthing.conversation.scan import Trailing, literals
from farthing.conversation.types import Conversation, Delta, Reasoning, Tool

CHANNEL, CHANNEL_END, CALL, CALL_END = "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"
QUOTE, RESULT = '<|"|>', "<|tool_response>"
MARKS = frozenset((CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE, RESULT))
_THOUGHT, _CALLED = "thought", "call:"
_NAME = re.compile(r'[^\s{}"<>()]+')
_WORDS = {"None": "null", "True": "true", "False": "false"}  # as templates in Python print them
_PUNCTUATION = re.compile(r"[{}\[\],:]")


class Notation:
    """Rewrites the arguments of a call as JSON, piece by piece."""

    def __init__(self) -> None:
        self._open: list[str] = []  # objects and arrays that have not ended
        self._key = False  # a key comes next
        self._word = ""  # bare text, or a key
        self._quoted = False
        self._exact = False  # the key was quoted
        self.begun = self.ended = False

    def quote(self) -> str:
        """The mark around a text."""
        self._quoted = not self._quoted
        self._exact = self._exact or self._key
        if self._key or self.ended:
            return ""
        self._word = ""
        return '"'

    def push(self, text: str) -> str:
        """JSON of which all that came before is the beginning."""
        if self.ended:
            return ""
        if self._quoted:
            if self._key:
                self._word += text
                return ""
            return json.dumps(text, ensure_ascii=False)[1:-1]
        out, at = [], 0
        for match in _PUNCTUATION.finditer(text):
            self._word += text[at : match.start()]
            at = match.end()
            if self._key and match[0] in ",[":  # part of a bare key
                self._word += match[0]
                continue
            out.append(self._mark(match[0]))
            if self.ended:
                return "".join(out)
        self._word += text[at:]
        return "".join(out)

    def _mark(self, mark: str) -> str:
        if mark == ":" and not self._key:
            self._word += mark
            return ""
        word = self._bare()
        if mark == ":":
            self._key = False
            return f"{word}: "
        if mark in "{[":
            self._open.append(mark)
            self.begun = True
        elif mark in "}]" and self._open:
            mark = "}" if self._open.pop() == "{" else "]"
            self.ended = not self._open
        self._key = mark in "{," and self._open[-1:] == ["{"]
        return word + mark

    def _bare(self) -> str:
        """The word that ended, as JSON."""
        word, exact = self._word if self._exact else self._word.strip(), self._exact
        self._word, self._exact = "", False
        if self._key:
            return json.dumps(word, ensure_ascii=False) if word or exact else ""
        word = _WORDS.get(word, word)
        try:
            json.loads(word or "null")
        except ValueError:
            return json.dumps(word, ensure_ascii=False)
        return word


class GemmaCalls(Machine):
    """Parses an answer: the channel `thought` is reasoning, and all else but calls is text."""

    def __init__(self, tools: tuple[Tool, ...], tokens: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._literals = literals(MARKS)
        self._known = {tool.name for tool in tools}
        self._state = self._body
        self._thinks = False  # the text is reasoning
        self._head = ""  # of a channel, or the name of a call
        self._blank = False  # white space comes after a channel or call
        self._trailing = Trailing()
        self._call = Notation()

    @property
    def inside(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        return self._state == self._arguments_of

    @property
    def reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as is known."""
        return self._state == self._body and self._thinks

    def finish(self) -> list[Delta]:
        """Flush what was held back. A call that was cut off keeps the arguments it has."""
        if self._state == self._body:
            rest = self._literals.unless_cut(self._buffer)
            marked = self._blank and self._literals.cut(rest)  # another mark follows at once
            self._send("" if marked else rest)
        elif self._state == self._arguments_of and not self._literals.cut(self._buffer):
            self._arguments(self._call.push(self._buffer))
        self._buffer = ""
        return self._taken()

    # States.

    def _until_mark(self) -> tuple[str, str | None]:
        """The text up to the next mark, and the mark; None: it has not come."""
        found = self._literals.find(self._buffer)
        text = self._take(found[0] if found else self._literals.ready(self._buffer))
        return text, self._take(found[1] - found[0]) if found else None

    def _body(self) -> bool:
        text, mark = self._until_mark()
        self._send(text)
        if mark in (CHANNEL, CALL):
            self._trailing.take()
            self._thinks, self._head = False, ""
            self._state = self._channel if mark == CHANNEL else self._name
        elif mark == CHANNEL_END:
            self._trailing.take()
            self._thinks, self._blank = False, True
        return mark is not None

    def _channel(self) -> bool:
        """Its name, up to the end of a line."""
        text, mark = self._until_mark()
        line, newline, rest = text.partition("\n")
        self._head += line
        if newline or mark or len(self._head) > MAX_HEAD:
            self._thinks, self._blank = self._head.strip() == _THOUGHT, True
            self._buffer = rest + (mark or "") + self._buffer
            self._state = self._body
            return True
        return False

    def _name(self) -> bool:
        """The function's name, up to its arguments."""
        text, mark = self._until_mark()
        head, brace, rest = text.partition("{")
        self._head += head
        name = self._head.strip().removeprefix(_CALLED).strip()
        if not (brace or mark or len(self._head) > MAX_HEAD):
            return False
        self._buffer = brace + rest + (mark or "") + self._buffer
        if (brace or mark == CALL_END) and (name in self._known or _NAME.fullmatch(name)):
            self._begin(name)
            self._call, self._state = Notation(), self._arguments_of
        else:  # the model wrote about calls
            self._state = self._body
            self._send(self._head)
        return True

    def _arguments_of(self) -> bool:
        text, mark = self._until_mark()
        self._arguments(self._call.push(text))
        if mark == QUOTE:
            self._arguments(self._call.quote())
        elif mark is not None:
            if not self._call.begun:
                self._arguments("{}")
            self._blank, self._state = True, self._body
            self._buffer = self._buffer if mark == CALL_END else mark + self._buffer
        return mark is not None

    # Shared by the states.

    def _send(self, text: str) -> None:
        if self._blank:
            text = text.lstrip()
        if not text:
            return
        self._blank = False
        if self._thinks:
            if ready := self._trailing.push(text):
                self._out.append(Reasoning(ready))
        else:
            self._text(text)


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """Gemma 3's prompt: a system text begins the first turn, and roles alternate. Raises FormatError."""
    if conversation.offered:
        raise FormatError("Gemma 3 has no tools; expected a conversation without, or another chat template")
    turns = list(conversation.turns)
    first = turns.pop(0).text + "\n\n" if turns and turns[0].role in ("system", "developer") else ""
    parts = [tokens.bos]
    for place, turn in enumerate(turns):
        if turn.role != ("assistant" if place % 2 else "user") or turn.calls:
            raise FormatError("turns of Gemma 3 alternate between user and assistant, without calls")
        role = "model" if turn.role == "assistant" else "user"
        open_ended = conversation.resume and place + 1 == len(turns)
        parts.append(f"{_TURN}{role}\n{first}{turn.text.strip()}{'' if open_ended else _TURN_END}")
        parts.append("" if open_ended else "\n")
        first = ""
    if conversation.generate and not conversation.resume:
        parts.append(f"{_TURN}model\n")
    return "".join(parts)


_TURN, _TURN_END = "<start_of_turn>", "<end_of_turn>"
GEMMA3 = ChatFormat("gemma3", render, stops=(_TURN_END,))
GEMMA4 = CallFormat("gemma4", GemmaCalls, MARKS, None, whole=True)
