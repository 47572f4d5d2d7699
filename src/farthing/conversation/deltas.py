"""The pieces a model's output is parsed into: reasoning, text and tool calls, in the order written."""

from __future__ import annotations

import uuid
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Another piece of the reasoning that precedes the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """Another piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The start of a tool call: its position in the answer, its id and its function."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Another piece of a call's arguments, which are JSON text."""

    index: int
    text: str


Delta = Reasoning | Text | CallStart | CallArguments


def new_call_id() -> str:
    """An id for a tool call whose format has no ids."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete output, assembled from its deltas."""

    text: str
    reasoning: str
    calls: tuple[tuple[str, str, str], ...]  # (id, name, arguments)


def collect(deltas: list[Delta]) -> Answer:
    """Assemble the deltas of a finished stream."""
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
