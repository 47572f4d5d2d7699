"""What a chat template expects of the messages it gets. Rendering a short tool loop finds out.

Templates of GLM, MiniMax and Qwen3-Coder iterate a call's arguments as an object, DeepSeek's append them as
text, and many accept both. Some print a call only if the text next to it is null, or refuse ids of another
length than 9. A template refuses efforts that its model does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import product
from typing import Any, Literal

from farthing.conversation.arguments import object_of
from farthing.conversation.formats.base import EFFORTS

Render = Callable[..., str]  # keyword arguments of a chat template -> prompt; raises ValueError

_VALUE = "probed"
_ARGUMENTS = {"city": _VALUE, "days": [1, {"from": None}]}
_TEXT = json.dumps(_ARGUMENTS)
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_SHORT_ID = 9  # characters of the ids that Mistral's templates accept


@dataclass(frozen=True, slots=True)
class Habits:
    """What a template expects. calls: it prints earlier calls. empty: how it wants the text of a turn that
    only calls. efforts: the values of reasoning_effort that it accepts; empty if it does not read one."""

    calls: bool = False
    arguments: Literal["text", "object"] = "text"
    empty: Literal["text", "null", "absent"] = "text"
    short_ids: bool = False
    efforts: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """The habits in words, for logs and reports."""
        form = "an object" if self.arguments == "object" else "text"
        said = f"reads the arguments of earlier calls as {form}" if self.calls else "prints no earlier calls"
        return f"{said}, accepts reasoning_effort {', '.join(self.efforts)}" if self.efforts else said

    def adapt(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template expects them. Arguments that are no JSON object become one with their text
        as its only value, for a model's invalid call must not end a conversation."""
        return [self._adapted(dict(message)) for message in messages]

    def _adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.short_ids and isinstance(identity := message.get("tool_call_id"), str):
            message["tool_call_id"] = _short(identity)
        if not message.get("tool_calls"):
            return message
        message["tool_calls"] = [self._call(dict(call)) for call in message["tool_calls"]]
        if not message.get("content") and self.empty != "text":
            message.pop("content", None)
            if self.empty == "null":
                message["content"] = None
        return message

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        if self.short_ids and isinstance(identity := call.get("id"), str):
            call["id"] = _short(identity)
        inner = isinstance(call.get("function"), Mapping)
        function = dict(call["function"]) if inner else call
        given = function.get("arguments")
        if self.arguments == "object":
            function["arguments"] = object_of(given)
        elif given is not None and not isinstance(given, str):
            function["arguments"] = json.dumps(given, ensure_ascii=False)
        return call | {"function": function} if inner else function


def probe(render: Render, names: frozenset[str]) -> Habits:
    """The habits of a template that reads these variables."""
    asked = EFFORTS if "reasoning_effort" in names else ()
    efforts = tuple(effort for effort in asked if _accepts(render, effort))
    for habits in _candidates():
        loop = partial(_loop, render, habits)
        text, whole = loop("text"), loop("object")
        # Null values and Python's notation show a template that was not written for objects.
        reads_object = _VALUE in whole and str(_ARGUMENTS) not in whole
        if _TEXT in text and (text == whole or not reads_object):
            return Habits(True, "text", *habits, efforts)  # the text as the model wrote it
        if reads_object:
            return Habits(True, "object", *habits, efforts)
    return Habits(efforts=efforts)


_Candidate = tuple[Literal["text", "null", "absent"], bool]


def _candidates() -> Iterator[_Candidate]:
    empties: tuple[Literal["text", "null", "absent"], ...] = ("text", "null", "absent")
    for short, empty in product((False, True), empties):
        yield empty, short


def _loop(render: Render, candidate: _Candidate, arguments: Literal["text", "object"]) -> str:
    """The prompt of a tool loop; empty if the template refuses it."""
    function = {"name": "probe", "arguments": _TEXT}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Probe."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_of_a_probe", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "Done.", "tool_call_id": "call_of_a_probe"},
    ]
    messages = Habits(True, arguments, *candidate).adapt(turns)
    try:
        return render(messages=messages, tools=[_TOOL], add_generation_prompt=True)
    except ValueError:
        return ""


def _accepts(render: Render, effort: str) -> bool:
    thinks = effort != "none"
    switches = {"reasoning_effort": effort, "thinking": thinks, "enable_thinking": thinks}
    messages = [{"role": "user", "content": "Probe."}]
    try:
        render(messages=messages, tools=None, add_generation_prompt=True, **switches)
    except ValueError:
        return False
    return True


def _short(identity: str) -> str:
    """An id of nine letters and digits, the same for a call and its result."""
    if len(identity) == _SHORT_ID and identity.isascii() and identity.isalnum():
        return identity
    return blake2b(identity.encode("utf-8", "replace")).hexdigest()[:_SHORT_ID]
