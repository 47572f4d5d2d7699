"""A conversation and the deltas of an answer: what every API's request becomes, and every model's output."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# The pieces a model's output is parsed into: reasoning, text and tool calls, in the order written.


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


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are, not copied."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call. parameters is a JSON schema; None: the function takes no arguments."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None  # arguments must obey the schema

    def document(self) -> dict[str, Any]:
        """The function as chat templates print it."""
        document: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            document["description"] = self.description
        if self.parameters is not None:
            document["parameters"] = dict(self.parameters)
        if self.strict is not None:
            document["strict"] = self.strict
        return document


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of an earlier turn. arguments is the JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `call_id` names the call that a turn of role "tool" answers."""

    role: Role
    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None
    name: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields, for the model's own template


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the client requires: a call, no call, or a call of one of `names`."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()  # only these may be called; empty: all
    single: bool = False  # exactly one function was named, so the call needs no list around it


@dataclass(frozen=True, slots=True)
class Conversation:
    """The conversation that the model continues."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice()
    parallel_calls: bool = True
    thinking: bool | None = None  # None: the format's default
    effort: str | None = None  # of reasoning; None: the format's default
    generate: bool = True  # end the prompt where the assistant's turn begins
    resume: bool = False  # leave the last assistant turn open, so that the model continues it
    template_options: Mapping[str, Any] = field(default_factory=dict)  # for the model's own template

    @property
    def characters(self) -> int:
        """Of the texts and calls of its turns, without reasoning, which formats may leave out."""
        return sum(
            len(turn.text) + sum(len(call.name) + len(call.arguments) for call in turn.calls)
            for turn in self.turns
        )

    def is_brief(self, most: int, per_turn: int) -> bool:
        """Whether it consists of texts alone, of at most `most` characters; a turn counts for `per_turn`."""
        size = 0
        for turn in self.turns:
            if turn.calls or turn.extra or turn.call_id or turn.name:
                return False
            size += per_turn + len(turn.text) + len(turn.reasoning)
        return size <= most and not (self.tools or self.template_options)

    def document(self) -> dict[str, Any]:
        """JSON of which `of_document` makes the same conversation, in another process."""
        turns = [_fields(turn) | {"calls": [_fields(call) for call in turn.calls]} for turn in self.turns]
        tools = [_fields(tool) for tool in self.tools]
        return _fields(self) | {"turns": turns, "tools": tools, "choice": _fields(self.choice)}

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Conversation:
        """The conversation that `document` describes."""
        turns = (
            Turn(**turn | {"calls": tuple(ToolCall(**call) for call in turn["calls"])})
            for turn in document["turns"]
        )
        choice = document["choice"]
        parts = {
            "turns": tuple(turns),
            "tools": tuple(Tool(**tool) for tool in document["tools"]),
            "choice": ToolChoice(**choice | {"names": tuple(choice["names"])}),
        }
        return cls(**{**document, **parts})

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools the prompt describes: all, or none if no call is allowed. A choice of some tools leaves
        the others in the prompt, so that the prefix cache still hits."""
        return () if self.choice.mode == "none" else self.tools

    @property
    def wants_reasoning(self) -> bool | None:
        """Whether the client wants the model to reason; None: it did not say."""
        if self.effort == "none":
            return False
        return self.thinking if self.thinking is not None or self.effort is None else True

    @property
    def has_calls(self) -> bool:
        """Whether an earlier turn called a tool."""
        return any(turn.calls for turn in self.turns)

    def with_single_calls(self) -> Conversation:
        """The same conversation with one call in a turn, which its result follows."""
        turns: list[Turn] = []
        waiting: dict[int, Turn] = {}  # later calls of a turn, by their number in it
        numbers: dict[str | None, deque[int]] = {}  # of the waiting calls with an id
        for turn in self.turns:
            if turn.role == "tool":
                if of_id := numbers.get(turn.call_id):
                    turns.append(waiting.pop(of_id.popleft()))
            else:
                turns += waiting.values()
                waiting, numbers = {}, {}
            if len(turn.calls) > 1:
                for number, call in enumerate(turn.calls[1:]):
                    waiting[number] = Turn("assistant", calls=(call,))
                    numbers.setdefault(call.id, deque()).append(number)
                turn = replace(turn, calls=turn.calls[:1])
            turns.append(turn)
        return replace(self, turns=(*turns, *waiting.values()))

    def with_results_in_call_order(self) -> Conversation:
        """The same conversation, with the results between two assistant turns in the order of their calls.

        Most formats print no ids, so the model takes the first result for that of its first call. Results
        stay where they are if one of them answers an unknown call.
        """
        turns = list(self.turns)
        order: dict[str | None, tuple[int, int]] = {}
        start = 0
        for position, turn in enumerate((*turns, Turn("assistant"))):
            if turn.role != "assistant":
                continue
            places = [at for at in range(start, position) if turns[at].role == "tool"]
            if all(turns[at].call_id in order for at in places):
                ranked = sorted((turns[at] for at in places), key=lambda result: order[result.call_id])
                for at, result in zip(places, ranked, strict=True):
                    turns[at] = result
            order |= {call.id: (position, place) for place, call in enumerate(turn.calls)}
            start = position
        return replace(self, turns=tuple(turns))
