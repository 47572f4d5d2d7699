"""What a chat format is: how it renders a conversation, and what its parser shares with others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from farthing.conversation.scan import MARK, literals
from farthing.conversation.strict import Syntax
from farthing.conversation.types import CallArguments, CallStart, Conversation, Delta, Text, Tool, new_call_id

# The interface and the shared machinery of the call parsers.

# A longer tag or function name is not markup; without a limit it could hold back the stream forever.
MAX_HEAD = 512


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags around the reasoning."""

    open: str = "<think>"
    close: str = "</think>"


THINK = Tags()
BRACKETS = Tags("[THINK]", "[/THINK]")  # Mistral's


class CallParser(Protocol):
    """Parses calls, and passes on the text around them."""

    calls: int  # begun so far
    anywhere: bool  # calls may begin inside the reasoning; otherwise the parser reads only the answer

    @property
    def reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as a parser knows that finds the reasoning itself."""

    @property
    def inside(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""

    def push(self, text: str) -> list[Delta]:
        """Parse one more piece and return the deltas that are certain."""

    def finish(self) -> list[Delta]:
        """The remaining deltas at the end of the output. A truncated call keeps the arguments it has."""


class NoCalls:
    """A parser that finds no calls. It removes `marks`, special tokens that have no meaning as text."""

    calls = 0
    anywhere = True
    inside = False
    reasoning = False

    def __init__(self, marks: frozenset[str] = frozenset()) -> None:
        self._marks = literals(marks) if marks else None
        self._buffer = ""

    def push(self, text: str) -> list[Delta]:
        """The text without marks, as far as it is certain."""
        if self._marks is not None:
            text = self._buffer + text
            while found := self._marks.find(text):
                text = text[: found[0]] + text[found[1] :]
            size = self._marks.ready(text)
            text, self._buffer = text[:size], text[size:]
        return [Text(text)] if text else []

    def finish(self) -> list[Delta]:
        """The rest, which could have become a mark."""
        rest, self._buffer = self._buffer, ""
        return [Text(rest)] if rest else []


class Machine:
    """States that consume from a buffer. A state returns whether it made progress, and if not waits for more
    text; it must leave at most a bounded number of characters behind."""

    anywhere = True

    @property
    def reasoning(self) -> bool:
        """Whether the next text is reasoning: most parsers read only what is not."""
        return False

    def __init__(self) -> None:
        self.calls = 0
        self._buffer = ""
        self._out: list[Delta] = []
        self._state: Callable[[], bool]

    @property
    def inside(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        return False

    def push(self, text: str) -> list[Delta]:
        """Parse one more piece and return the deltas that are certain."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._taken()

    def _taken(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def _take(self, size: int) -> str:
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text

    def _text(self, text: str) -> None:
        if text:
            self._out.append(Text(text))

    def _begin(self, name: str, identity: str | None = None) -> None:
        self._out.append(CallStart(self.calls, identity or new_call_id(), name))
        self.calls += 1

    def _arguments(self, text: str) -> None:
        if text:
            self._out.append(CallArguments(self.calls - 1, text))


class Delimiters:
    """Tags that a format writes around text of others and that are no tokens of their own.

    A token that is spelled out in a text can be told from the real one; such a tag cannot. So a backslash
    after its first character breaks a tag that a text contains, as in JSON: `<\\/result>`. Readers still
    understand it, and unlike an invisible character, a model that copies it shows what it copies.
    """

    def __init__(self, *tags: str) -> None:
        spelled = (f"{MARK}*".join(map(re.escape, tag)) for tag in tags)  # marks do not reach the model
        self._pattern = re.compile("|".join(spelled))

    def broken(self, text: str) -> str:
        """A text without these tags."""
        return self._pattern.sub(lambda tag: f"{tag[0][0]}\\{tag[0][1:]}", text)


# The definition of a chat format.

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # that clients of all APIs may request
REASONING = ("reasoning_content", "reasoning", "thinking")  # names under which templates read it


class FormatError(ValueError):
    """The format cannot express a conversation. The message says what is accepted."""


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The model's tokens that a format may write."""

    bos: str = "<｜begin▁of▁sentence｜>"
    eos: str = "<｜end▁of▁sentence｜>"


class MakesParser(Protocol):
    """Creates a parser of calls. tokens: the markup that the model writes as special tokens."""

    def __call__(self, tools: tuple[Tool, ...], tokens: frozenset[str] = frozenset(), /) -> CallParser:
        """A parser of one answer."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How models write calls whose prompts only their own templates render. The fields are ChatFormat's."""

    name: str
    calls: MakesParser
    markup: frozenset[str]
    syntax: Syntax | None
    whole: bool = False
    within: Tags | None = None


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A named format: renders conversations and creates parsers of answers.

    tags: around the reasoning; None: the model does not reason, or the format is `whole`. efforts: the
    reasoning efforts the format can express; ("none",) if reasoning can only be switched off, () if not even
    that. stops: tokens that end the assistant's turn, besides the model's own.
    """

    name: str
    render: Callable[[Conversation, ControlTokens], str]
    calls: MakesParser = lambda tools, tokens=frozenset(): NoCalls()
    tags: Tags | None = None
    efforts: tuple[str, ...] = ()
    markup: frozenset[str] = frozenset()  # control tokens the parser must see as text
    stops: tuple[str, ...] = ()
    syntax: Syntax | None = None  # of calls, for grammars
    strips: bool = False  # `render` removes a block of reasoning at the beginning of an answer's text
    whole: bool = False  # the parser reads every answer, and finds the reasoning itself
    within: Tags | None = None  # around that reasoning, if prompts may end within it
    calling: frozenset[str] | None = None  # the part of `markup` without which there are no calls; None: all
    answer: str = ""  # begins an answer without reasoning, which a grammar of the whole answer follows

    @property
    def reasons(self) -> bool:
        """Whether models of this format reason."""
        return self.tags is not None or self.whole

    def thinks(self, conversation: Conversation, default: bool) -> bool:
        """Whether the model should reason first: the client's choice, else the default."""
        wanted = conversation.wants_reasoning
        return default if wanted is None else wanted
