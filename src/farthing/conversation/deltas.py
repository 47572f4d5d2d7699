"""What a model's output becomes: pieces of reasoning, text and tool calls, in the order they were written."""

from __future__ import annotations

import uuid
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the reasoning that precedes the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins: its position in the answer, its id and the function it names."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: a piece of a JSON text."""

    index: int
    text: str


Delta = Reasoning | Text | CallStart | CallArguments


def new_call_id() -> str:
    """An id for a tool call of a format that has none of its own."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole output put together from its deltas."""

    text: str
    reasoning: str
    calls: tuple[tuple[str, str, str], ...]  # (id, name, arguments)


def collect(deltas: list[Delta]) -> Answer:
    """The whole of a finished stream of deltas."""
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[str, str, list[str]]] = []
    for delta in deltas:
        match delta:
            case Text(piece):
                text.append(piece)
            case Reasoning(piece):
                reasoning.append(piece)
            case CallStart(_, identity, name):
                calls.append((identity, name, []))
            case CallArguments(index, piece):
                calls[index][2].append(piece)
    done = tuple((identity, name, "".join(pieces)) for identity, name, pieces in calls)
    return Answer("".join(text), "".join(reasoning), done)
