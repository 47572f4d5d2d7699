"""The definition of a chat format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from farthing.conversation.parse.base import CallParser, NoCalls, Tags
from farthing.conversation.strict import Syntax
from farthing.conversation.types import Conversation, Tool

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # that clients of all APIs may request


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
class ChatFormat:
    """A named format: renders conversations and creates parsers of answers.

    tags: around the reasoning; None: the model does not reason. efforts: the reasoning efforts the format can
    express; ("none",) if reasoning can only be switched off, () if not even that. stops: tokens that end the
    assistant's turn, besides the model's own.
    """

    name: str
    render: Callable[[Conversation, ControlTokens], str]
    calls: MakesParser = lambda tools, tokens=frozenset(): NoCalls()
    tags: Tags | None = None
    efforts: tuple[str, ...] = ()
    markup: frozenset[str] = frozenset()  # control tokens the parser must see as text
    stops: tuple[str, ...] = ()
    syntax: Syntax | None = None  # of calls, for grammars

    def thinks(self, conversation: Conversation, default: bool) -> bool:
        """Whether the model should reason first: the client's choice, else the default."""
        wanted = conversation.wants_reasoning
        return default if wanted is None else wanted
