"""The chat format of a model: by its type, or by what its template does with a probe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from farthing.conversation.arguments import object_of
from farthing.conversation.base import (
    BRACKETS,
    EFFORTS,
    REASONING,
    THINK,
    CallFormat,
    ChatFormat,
    NoCalls,
    Tags,
)
from farthing.conversation.formats.deepseek_v3 import R1, V3
from farthing.conversation.formats.deepseek_v4 import V4
from farthing.conversation.formats.deepseek_v31 import EITHER, V31
from farthing.conversation.formats.deepseek_v32 import V32
from farthing.conversation.formats.glm import GLM45, GLM47
from farthing.conversation.formats.harmony import HARMONY
from farthing.conversation.formats.kimi_k2 import KIMI_K2, KIMI_K2_THINKING, KIMI_K25
from farthing.conversation.formats.written import BY_MARKUP, TOOLLESS
from farthing.conversation.strict import JsonCalls

# What a chat template expects of the messages it gets. Rendering a short tool loop finds out.
#
# Templates of GLM, MiniMax and Qwen3-Coder iterate a call's arguments as an object, DeepSeek's append
# them as text, and many accept both. Some print a call only if the text next to it is null, or refuse ids
# of another length than 9. A template refuses efforts that its model does not know. gpt-oss's prints one
# call of a turn, whose text and reasoning it does not take together.

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
_FIRST = ("system", "developer")  # roles of turns that some templates know only at the start
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
    single: bool = False  # it prints only the first call of a turn, or refuses a second one
    apart: bool = False  # it refuses text and reasoning in one turn that calls
    leading: bool = False  # it refuses or leaves out a system turn that is not at the start
    drops: bool = False  # it leaves out the system turn after a tool's result

    @classmethod
    def of_document(cls, fields: dict[str, Any]) -> Habits:
        """The habits that a child process found, which are the fields as JSON has them."""
        return cls(**fields | {"efforts": tuple(fields["efforts"])})

    @property
    def described(self) -> str:
        """The habits in words, for logs and reports."""
        form = "an object" if self.arguments == "object" else "text"
        said = f"reads the arguments of earlier calls as {form}" if self.calls else "prints no earlier calls"
        return f"{said}, accepts reasoning_effort {', '.join(self.efforts)}" if self.efforts else said

    def adapt(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template expects them. Arguments that are no JSON object become one with their text
        as its only value, for a model's invalid call must not end a conversation."""
        adapted = [self._adapted(dict(message)) for message in messages]
        adapted = _joined(adapted) if self.leading else adapted
        adapted = _with_user(adapted) if self.drops else adapted
        return list(_one_by_one(adapted)) if self.single else adapted

    def _adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.short_ids and isinstance(identity := message.get("tool_call_id"), str):
            message["tool_call_id"] = _short(identity)
        if not message.get("tool_calls"):
            return message
        message["tool_calls"] = [self._call(dict(call)) for call in message["tool_calls"]]
        if self.apart and message.get("content") and message.get("thinking"):
            message["content"] = f"{message['thinking']}\n\n{message['content']}"
            for name in REASONING:
                message.pop(name, None)
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
    late = [{"role": "user", "content": "Probe."}, {"role": "system", "content": _VALUE}]
    as_given, joined = (_prompt(render, messages) or "" for messages in (late, _joined(late)))
    return replace(_of_calls(render, names), leading=_VALUE in joined and _VALUE not in as_given)


def _of_calls(render: Render, names: frozenset[str]) -> Habits:
    asked = EFFORTS if "reasoning_effort" in names else ()
    efforts = tuple(effort for effort in asked if _accepts(render, effort))
    for habits in _candidates():
        loop = partial(_loop, render, habits)
        text, whole = loop("text"), loop("object")
        # Null values and Python's notation show a template that was not written for objects.
        reads_object = _VALUE in whole and str(_ARGUMENTS) not in whole
        if _TEXT in text and (text == whole or not reads_object):
            return _of_turns(render, Habits(True, "text", *habits, efforts))  # the text as the model wrote it
        if reads_object:
            return _of_turns(render, Habits(True, "object", *habits, efforts))
    return Habits(efforts=efforts)


def _of_turns(render: Render, habits: Habits) -> Habits:
    """The habits that show in turns with more than one call, or with a call, text and reasoning."""
    loop = partial(_loop, render, (habits.empty, habits.short_ids), habits.arguments)
    two = loop(names=("probe", "probe_again"))
    text = loop(said={"content": "Probing."})
    both = loop(said={"content": "Probing.", **dict.fromkeys(REASONING, "Hm.")})
    led = loop(before=[{"role": "system", "content": "Led."}])
    single = "probe_again" not in two
    return replace(
        habits, single=single, apart=bool(text) and not both, drops=bool(led) and "Led." not in led
    )


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which a system turn after the start is the end of the turn before it. After an assistant's
    it is a user's turn, or the beginning of the one that follows."""
    joined: list[dict[str, Any]] = []
    moved = None  # the user's turn that ends with a system turn's text
    for message in messages:
        last, role = joined[-1] if joined else message, message.get("role")
        late = role in _FIRST and last.get("role") not in _FIRST
        if late and last.get("role") == "assistant":
            moved = {"role": "user", "content": message.get("content", "")}
            joined.append(moved)
        elif late or (role == "user" and last is moved):
            joined[-1] = last | {"content": f"{last.get('content', '')}\n\n{message.get('content', '')}"}
            moved = joined[-1] if last.get("role") == "user" else None
        else:
            joined.append(message)
    return joined


def _with_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which the last user's turn begins with the system turn, unless nothing follows that turn:
    there, a template that drops the system turn prints it so itself."""
    users = [place for place, message in enumerate(messages) if message.get("role") == "user"]
    if messages[0].get("role") not in _FIRST or not users or users[-1] == len(messages) - 1:
        return messages
    messages = list(messages)
    first, last = messages[0], messages[users[-1]]
    messages[users[-1]] = last | {"content": f"{first.get('content', '')}\n\n{last.get('content', '')}"}
    return messages[1:]


def _one_by_one(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Messages in which a turn has one call, which its result follows."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            yield message
            continue
        end = at
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        results, at = list(messages[at:end]), end
        for place, call in enumerate(calls):
            yield (message if place == 0 else {"role": "assistant", "content": ""}) | {"tool_calls": [call]}
            own = [result for result in results if result.get("tool_call_id") == call.get("id")]
            if place + 1 == len(calls):
                own = results
            results = [result for result in results if result not in own]
            yield from own


_Candidate = tuple[Literal["text", "null", "absent"], bool]


def _candidates() -> Iterator[_Candidate]:
    empties: tuple[Literal["text", "null", "absent"], ...] = ("text", "null", "absent")
    for short, empty in product((False, True), empties):
        yield empty, short


def _loop(
    render: Render,
    candidate: _Candidate,
    arguments: Literal["text", "object"],
    names: Sequence[str] = ("probe",),
    said: Mapping[str, Any] = MappingProxyType({}),
    before: Sequence[dict[str, Any]] = (),
) -> str:
    """The prompt of a tool loop; empty if the template refuses it. said: further fields of the turn. before:
    turns at the start."""
    calls = [
        {
            "id": f"call_of_a_{name}",
            "type": "function",
            "function": {"name": name, "arguments": _TEXT},
        }
        for name in names
    ]
    turns: list[dict[str, Any]] = [
        *before,
        {"role": "user", "content": "Probe."},
        {"role": "assistant", "content": "", "tool_calls": calls, **said},
        *({"role": "tool", "content": "Done.", "tool_call_id": call["id"]} for call in calls),
    ]
    return _prompt(render, Habits(True, arguments, *candidate).adapt(turns), [_TOOL]) or ""


def _accepts(render: Render, effort: str) -> bool:
    thinks = effort != "none"
    switches = {"reasoning_effort": effort, "thinking": thinks, "enable_thinking": thinks}
    return _prompt(render, [{"role": "user", "content": "Probe."}], **switches) is not None


def _prompt(
    render: Render, messages: Sequence[Mapping[str, Any]], tools: Any = None, **values: Any
) -> str | None:
    """The prompt; None if the template refuses it."""
    try:
        return render(messages=messages, tools=tools, add_generation_prompt=True, **values)
    except ValueError:
        return None


def _short(identity: str) -> str:
    """An id of nine letters and digits, the same for a call and its result."""
    if len(identity) == _SHORT_ID and identity.isascii() and identity.isalnum():
        return identity
    return blake2b(identity.encode("utf-8", "replace")).hexdigest()[:_SHORT_ID]


FORMATS = {
    each.name: each
    for each in (V3, R1, V31, V32, V4, KIMI_K2, KIMI_K2_THINKING, KIMI_K25, GLM45, GLM47, HARMONY)
}
# Also those that no command line can name, because they have no tools.
PACKAGED: Mapping[str, ChatFormat] = FORMATS | {each.name: each for each in TOOLLESS.values()}
# Whose calls `--tool-call-parser` can name.
CALLS: Mapping[str, CallFormat | ChatFormat] = FORMATS | {each.name: each for each in BY_MARKUP.values()}
OWN = "own"  # the checkpoint's template


def template_source(option: str | None) -> str | None:
    """The Jinja source in the file `chat_template`; None for a packaged format. Raises ValueError."""
    if option is None or option in FORMATS:
        return None
    try:
        return Path(option).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat_template: got {option!r}; expected a readable file or one of {', '.join(FORMATS)}"
        ) from error


BY_TYPE = {
    "deepseek_v32": V32,
    "deepseek_v4": V4,
    "kimi_k2": KIMI_K2,
    "kimi_k25": KIMI_K25,
    "glm4_moe": GLM45,
    "glm4_moe_lite": GLM47,
    "glm_moe_dsa": GLM47,
    "gpt_oss": HARMONY,
    **TOOLLESS,
}
_BY_TOKEN = {
    "｜DSML｜": V4,
    "<|tool_calls_section_begin|>": KIMI_K2,
    "<arg_key>": GLM45,
    "<|channel|>": HARMONY,
}
# What a template contains: GLM's has Hermes' tags, too.
_BY_MARKUP: Mapping[str, CallFormat | ChatFormat] = {
    "</arg_key><arg_value>": GLM47,
    "<arg_key>": GLM45,
    **BY_MARKUP,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The facts about a checkpoint that decide its format. template: None if it has none of its own; habits:
    of that template."""

    model_type: str
    template: str | None
    has_token: Callable[[str], bool]
    habits: Habits = field(default_factory=Habits)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The formats a server uses. `template` is the source of `plain` if that is the model's own template, and
    `efforts` the values of reasoning_effort that it accepts.

    `tools` serves conversations with tools. It differs from `plain` if the own template never prints them.
    """

    plain: ChatFormat
    tools: ChatFormat
    template: str | None = None
    efforts: tuple[str, ...] = ()
    offers: bool = True  # `tools` prints definitions of tools

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What conversations may use, in the words of Ollama's API."""
        calls = self.offers and not isinstance(self.tools.calls(()), NoCalls)
        return ("completion", *("tools",) * calls, *("thinking",) * self.plain.reasons)


def choose(
    checkpoint: Checkpoint, template: str | None = None, calls: str = "auto", reasoning: str = "auto"
) -> Chosen:
    """template: a name of FORMATS, or None for the checkpoint's. calls, reasoning: whose parsers to use."""
    if template in FORMATS:
        packaged = _with_parsers(FORMATS[template], calls, reasoning)
        return Chosen(packaged, packaged)
    related = _related(checkpoint)
    source = checkpoint.template
    if source is None:
        packaged = _with_parsers(related or V3, calls, reasoning)
        return Chosen(packaged, packaged)
    from farthing.conversation.jinja import variables

    names = variables(source)
    whole = related is not None and related.whole
    efforts = related.efforts if related and whole else _efforts(names, checkpoint.habits)
    own = replace(
        related or V3,
        name=OWN,
        tags=None if whole else _tags(checkpoint, source, names),
        efforts=efforts,
        syntax=related.syntax if related else _deepseek_syntax(checkpoint, source),
    )
    if related is None and (written := _written(source)) is not None:
        own = _calling(own, written)
    plain = _with_parsers(own, calls, reasoning)
    if "tools" in names:
        return Chosen(plain, plain, source, efforts if whole else checkpoint.habits.efforts)
    packaged = _with_parsers(
        replace(related or _deepseek(checkpoint, names), tags=own.tags), calls, reasoning
    )
    offers = _can_call(checkpoint)
    return Chosen(plain, packaged if offers else plain, source, checkpoint.habits.efforts, offers)


def _tags(checkpoint: Checkpoint, source: str, names: frozenset[str]) -> Tags | None:
    """The tags around the reasoning; None if the model does not reason."""
    if BRACKETS.open in source:
        return BRACKETS
    return THINK if _reasons(checkpoint, source, names) else None


def _reasons(checkpoint: Checkpoint, source: str, names: frozenset[str]) -> bool:
    """Whether a model reasons, by its template: it switches reasoning on or off, or writes its opening tag.

    A template that only removes earlier reasoning mentions only the closing tag. If its model reasons, it
    writes the opening tag itself, so that is one of its tokens.
    """
    switches = names & {"thinking", "enable_thinking", "reasoning_effort"}
    itself = THINK.close in source and checkpoint.has_token(THINK.open)
    return bool(switches) or THINK.open in source or itself


def _deepseek_syntax(checkpoint: Checkpoint, source: str) -> JsonCalls | None:
    """How a model of no other family writes calls, as far as is known."""
    (opener,) = EITHER.openers
    return EITHER if opener in source or checkpoint.has_token(opener) else None


def _written(source: str) -> CallFormat | ChatFormat | None:
    """The format of the calls that a template prints."""
    return next((form for markup, form in _BY_MARKUP.items() if markup in source), None)


def _calling(form: ChatFormat, other: CallFormat | ChatFormat) -> ChatFormat:
    """A format with the calls of another."""
    whole, tags = (True, None) if other.whole else (form.whole, form.tags)
    form = replace(form, markup=other.markup, syntax=other.syntax, within=other.within)
    return replace(form, calls=other.calls, whole=whole, tags=tags)


def _related(checkpoint: Checkpoint) -> ChatFormat | None:
    """The packaged format of the model's family; None for DeepSeek V3, R1, V3.1 and unknown models."""
    form = BY_TYPE.get(checkpoint.model_type)
    if form is None:
        form = next((form for token, form in _BY_TOKEN.items() if checkpoint.has_token(token)), None)
    if form is KIMI_K2 and checkpoint.has_token(THINK.open):  # both releases have the same type
        return KIMI_K2_THINKING
    if form in (GLM45, GLM47) and checkpoint.template is not None:  # GLM-4.7 has the type of GLM-4.5
        return GLM47 if "</arg_key><arg_value>" in checkpoint.template else GLM45
    return form


def _deepseek(checkpoint: Checkpoint, names: frozenset[str]) -> ChatFormat:
    if "thinking" in names:
        return V31
    return R1 if THINK.open in (checkpoint.template or "") else V3


def _can_call(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer has the tokens of a packaged format."""
    marks = ("<｜tool▁calls▁begin｜>", *_BY_TOKEN)
    return any(checkpoint.has_token(mark) for mark in marks)


def _efforts(names: frozenset[str], habits: Habits) -> tuple[str, ...]:
    """The reasoning efforts that a template with these variables can express."""
    switched = ("none",) if names & {"thinking", "enable_thinking"} else ()
    return tuple(dict.fromkeys((*switched, *habits.efforts)))


def _with_parsers(form: ChatFormat, calls: str, reasoning: str) -> ChatFormat:
    if calls != "auto":
        form = replace(_calling(form, CALLS[calls]), markup=form.markup | CALLS[calls].markup)
    if reasoning == "none":
        return replace(form, tags=None)
    return form if reasoning == "auto" else replace(form, tags=FORMATS[reasoning].tags)
