"""Harmony, the format of gpt-oss: messages in channels, one of them for reasoning, and tools in TypeScript.

    <|start|>assistant<|channel|>analysis<|message|>REASONING<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>
    <|start|>assistant<|channel|>final<|message|>ANSWER<|return|>

without line breaks. The prompt ends with `<|start|>assistant`. The recipient is also written before the
channel, and what is in the channel `commentary` without one is a text for the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

from farthing.conversation.base import MAX_HEAD, ChatFormat, ControlTokens, Machine
from farthing.conversation.scan import JsonObject, literals, plain
from farthing.conversation.strict import JsonCalls, Section
from farthing.conversation.types import Conversation, Delta, Reasoning, Text, Tool, Turn

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = frozenset((START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN))
_ANALYSIS, _COMMENTARY, _FINAL = "analysis", "commentary", "final"
_FUNCTIONS = "functions."
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_TO = " to="
_BETWEEN = "\n\n"  # of two messages that become one text


class HarmonyMessages(Machine):
    """Parses an answer: the analysis is reasoning, messages to functions are calls, and all else is text.

    A text before the first mark is an answer, too: it continues the message that the prompt began, or the
    model has forgotten its channel. tokens: the marks known to be special tokens, which end a call even
    within a string; the others may be part of the string.
    """

    def __init__(self, tools: tuple[Tool, ...], tokens: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._tokens = tokens
        self._object = JsonObject()
        self._known = {tool.name for tool in tools}
        self._literals = literals(MARKS)
        self._state = self._start
        self._head = ""  # of the message being read
        self._kind: Literal["reasoning", "text", "call"] = "text"
        self._written = {"reasoning": False, "text": False, "call": False}  # in earlier messages of the kind
        self._fresh = True  # nothing of this message was sent
        self._apart = False  # it is not the first one of its kind

    @property
    def inside(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        return self._state == self._body and self._kind == "call"

    @property
    def reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as is known."""
        return self._state == self._body and self._kind == "reasoning"

    def finish(self) -> list[Delta]:
        """Flush what was held back. A head that was cut off is dropped."""
        if self._state == self._start and not self._literals.cut(self._buffer):
            self._begin_body("text")
        if self._state == self._body:
            self._send(self._literals.unless_cut(self._buffer))
            self._end_body()
        self._buffer = ""
        return self._taken()

    # States.

    def _start(self) -> bool:
        """Before a head, of which the first one's beginning is in the prompt."""
        if self._buffer.startswith((_TO, *MARKS)):
            self._state = self._header
        elif _TO.startswith(self._buffer) or self._literals.ready(self._buffer) == 0:
            return False
        else:
            self._begin_body("text")
        return True

    def _header(self) -> bool:
        """Up to the mark that ends it."""
        found = self._literals.find(self._buffer)
        size = found[0] if found else self._literals.ready(self._buffer)
        room = MAX_HEAD - len(self._head)
        if size > room:  # no head is so long: from here on it is text, wherever the output is cut
            self._take(max(room, 0))
            self._begin_body("text")
            return True
        self._head += self._take(size)
        if found is None:
            return False
        mark = self._take(found[1] - found[0])
        if mark == MESSAGE:
            self._open()
        elif mark in (END, CALL, RETURN):
            self._head, self._state = "", self._start
        else:
            self._head = "" if mark == START else self._head + mark
        return True

    def _body(self) -> bool:
        found = self._literals.find(self._buffer)
        size = found[0] if found else self._literals.ready(self._buffer)
        self._send(self._take(size))
        if found is None:
            return False
        mark = self._take(found[1] - found[0])
        if self._kind == "call" and self._object.quoted and mark not in self._tokens:
            self._send(mark)
            return True
        if mark in (MESSAGE, CONSTRAIN):  # amid a message they mean nothing
            return True
        self._end_body()
        self._head = CHANNEL if mark == CHANNEL else ""
        self._state = self._header if mark in (START, CHANNEL) else self._start
        return True

    # Shared by the states.

    def _open(self) -> None:
        head, recipient = self._head, _RECIPIENT.search(self._head)
        name = recipient[1].removeprefix(_FUNCTIONS) if recipient else ""
        if recipient and (recipient[1].startswith(_FUNCTIONS) or name in self._known):
            self._begin(name)
            self._begin_body("call")
            self._object = JsonObject()
            return
        channel = _CHANNEL.search(head)
        hidden = recipient is not None or (channel is not None and channel[1] == _ANALYSIS)
        self._begin_body("reasoning" if hidden else "text")
        self._apart = self._written[self._kind]

    def _begin_body(self, kind: Literal["reasoning", "text", "call"]) -> None:
        self._kind, self._fresh, self._head, self._state = kind, True, "", self._body
        self._apart = False

    def _send(self, text: str) -> None:
        if not text:
            return
        if self._kind == "call":
            self._object.push(text)
            self._arguments(text)
        else:
            between = _BETWEEN if self._fresh and self._apart else ""
            made = Reasoning if self._kind == "reasoning" else Text
            self._out.append(made(between + text))
        self._fresh = False

    def _end_body(self) -> None:
        if self._kind == "call" and self._fresh:
            self._arguments("{}")
        self._written[self._kind] |= not self._fresh


# Prompts. The texts around the conversation are those that the models were trained with.

_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
_CUTOFF = "Knowledge cutoff: 2024-06"
_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
_TO_COMMENTARY = "\nCalls to these tools must go to the commentary channel: 'functions'."
_LONGEST_ITEM = 50  # characters of an array's type that are still written
_BEFORE_TYPE, _BEFORE_DEFAULT = "\n" + 16 * " ", 20 * " "  # which the template leaves in nested types


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """The prompt. The analysis before a call is kept until a later turn answers without one."""
    turns = list(conversation.with_single_calls().turns)
    parts = [_system(conversation)]
    first = turns.pop(0).text if turns and turns[0].role in ("system", "developer") else ""
    if first or conversation.offered:
        instructions = f"# Instructions\n\n{first}\n\n" if first else ""
        parts.append(_message("developer", instructions + _namespace(conversation.offered)))
    parts += _turns(turns, conversation)
    if conversation.generate and not conversation.resume:
        parts.append(f"{START}assistant")
    return "".join(parts)


def _system(conversation: Conversation) -> str:
    effort = conversation.effort if conversation.effort in EFFORTS else "medium"
    about = f"{_IDENTITY}\n{_CUTOFF}\nCurrent date: {datetime.now():%Y-%m-%d}\n\nReasoning: {effort}\n\n"
    return _message("system", about + _CHANNELS + (_TO_COMMENTARY if conversation.offered else ""))


def _message(head: str, text: str, end: str = END) -> str:
    return f"{START}{head}{MESSAGE}{text}{end}"


def _turns(turns: list[Turn], conversation: Conversation) -> Iterator[str]:
    answered = max(
        (i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.calls), default=-1
    )
    name = ""  # of the latest call
    for position, turn in enumerate(turns):
        last = position + 1 == len(turns)
        if turn.role == "user":
            yield _message("user", turn.text)
        elif turn.role in ("system", "developer"):
            yield _message("developer", f"# Instructions\n\n{turn.text}\n\n")
        elif turn.role == "tool":
            text = json.dumps(turn.text, ensure_ascii=False)
            yield _message(f"{_FUNCTIONS}{name} to=assistant{CHANNEL}{_COMMENTARY}", text)
        elif turn.calls:
            thought = _BETWEEN.join(filter(None, (turn.reasoning, turn.text)))
            if thought and position > answered:
                yield _message(f"assistant{CHANNEL}{_ANALYSIS}", thought)
            (call,) = turn.calls
            name = call.name
            head = f"assistant to={_FUNCTIONS}{name}{CHANNEL}{_COMMENTARY} json"
            yield _message(head, _compact(call.arguments), CALL)
        else:
            ends = last and not conversation.generate
            if ends and turn.reasoning:
                yield _message(f"assistant{CHANNEL}{_ANALYSIS}", turn.reasoning)
            end = "" if last and conversation.resume else RETURN if ends else END
            yield _message(f"assistant{CHANNEL}{_FINAL}", turn.text, end)


def _compact(arguments: str) -> str:
    """Arguments as the model's template writes them; other text as it is."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments


def _namespace(tools: tuple[Tool, ...]) -> str:
    if not tools:
        return ""
    declared = "".join(map(_declared, tools))
    return f"# Tools\n\n## functions\n\nnamespace functions {{\n\n{declared}}} // namespace functions"


def _declared(tool: Tool) -> str:
    parameters = tool.parameters or {}
    properties, required = parameters.get("properties"), parameters.get("required") or []
    head = f"// {tool.description or ''}\ntype {tool.name} = "
    if not isinstance(properties, Mapping) or not properties:
        return f"{head}() => any;\n\n"
    fields = "".join(_field(name, schema, required) for name, schema in properties.items())
    return f"{head}(_: {{\n{fields}}}) => any;\n\n"


def _field(name: str, schema: Any, required: Any) -> str:
    """One parameter of a function, with its description and default."""
    schema = schema if isinstance(schema, Mapping) else {}
    about = f"// {schema['description']}\n" if schema.get("description") else ""
    default = ""
    if "default" in schema:
        value = schema["default"]
        shown = value if schema.get("enum") or schema.get("oneOf") else json.dumps(value, ensure_ascii=False)
        default = f"{'' if schema.get('oneOf') and not schema.get('enum') else ', '}// default: {shown}"
    return f"{about}{name}{'' if _has(required, name) else '?'}: {_type(schema)}{default},\n"


def _has(required: Any, name: str) -> bool:
    return isinstance(required, list | tuple) and any(plain(str(each)) == plain(name) for each in required)


def _type(schema: Any) -> str:
    """A JSON schema as TypeScript, as far as the models' template writes it."""
    schema = schema if isinstance(schema, Mapping) else {}
    kind, null = schema.get("type"), " | null" if schema.get("nullable") else ""
    if kind == "array":
        return _array(schema.get("items")) + null
    if isinstance(kind, list | tuple) and kind:
        return " | ".join(map(str, kind))
    if variants := schema.get("oneOf"):
        return _union(variants)
    if kind == "string":
        return '"' + '" | "'.join(map(str, schema["enum"])) + '"' if schema.get("enum") else f"string{null}"
    if kind in ("number", "integer"):
        return "number"
    if kind == "object":
        return _object(schema)
    return "boolean" if kind == "boolean" else "any"


def _array(items: Any) -> str:
    if not items:
        return "any[]"
    inner = _type({"type": items.get("type")} if _simple(items) else items)
    return "any[]" if inner == "object | object" or len(inner) > _LONGEST_ITEM else f"{inner}[]"


def _simple(items: Any) -> bool:
    return isinstance(items, Mapping) and items.get("type") in ("string", "number", "integer", "boolean")


def _union(variants: Any) -> str:
    shown = []
    for variant in variants:
        about = f"// {variant['description']}" if variant.get("description") else ""
        default = ""
        if "default" in variant:
            default = f"{_BEFORE_DEFAULT}// default: {json.dumps(variant['default'], ensure_ascii=False)}"
        shown.append(_type(variant) + about + default)
    return " | \n".join(shown)


def _object(schema: Mapping[str, Any]) -> str:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping) or not properties:
        return "object"
    fields = (
        f"{name}{'' if _has(required, name) else '?'}: {_BEFORE_TYPE}{_type(inner)}"
        for name, inner in properties.items()
    )
    return "{\n" + ", ".join(fields) + "}"


EFFORTS = ("low", "medium", "high")
_OPENER = f"{CHANNEL}{_COMMENTARY} to={_FUNCTIONS}"
HARMONY = ChatFormat(
    "harmony",
    render,
    HarmonyMessages,
    efforts=EFFORTS,
    markup=MARKS,
    stops=(CALL, RETURN),
    syntax=JsonCalls(
        (_OPENER, f"{START}assistant to={_FUNCTIONS}"),
        tuple(
            (f"{{name}}{middle}json{MESSAGE}", "")
            for middle in (
                f" {CONSTRAIN}",
                " ",
                f"{CHANNEL}{_COMMENTARY} {CONSTRAIN}",
                f"{CHANNEL}{_COMMENTARY} ",
            )
        ),
        MARKS,
        Section("", f"{CALL}{START}assistant", ""),
    ),
    whole=True,
    calling=frozenset((CONSTRAIN, CALL)),
    answer=f"{CHANNEL}{_FINAL}{MESSAGE}",
)
