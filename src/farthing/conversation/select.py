"""Chooses a model's chat format: from the command line, else from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from farthing.conversation.formats import deepseek_v3, deepseek_v31
from farthing.conversation.formats.base import ChatFormat
from farthing.conversation.formats.deepseek_v3 import R1, V3
from farthing.conversation.formats.deepseek_v4 import V4
from farthing.conversation.formats.deepseek_v31 import V31
from farthing.conversation.formats.deepseek_v32 import V32
from farthing.conversation.formats.glm45 import GLM45, GLM47
from farthing.conversation.formats.kimi_k2 import KIMI_K2, KIMI_K2_THINKING, KIMI_K25
from farthing.conversation.habits import Habits
from farthing.conversation.parse.base import THINK
from farthing.conversation.parse.delimited import DEEPSEEK
from farthing.conversation.strict import JsonCalls

FORMATS = {
    each.name: each for each in (V3, R1, V31, V32, V4, KIMI_K2, KIMI_K2_THINKING, KIMI_K25, GLM45, GLM47)
}
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


_BY_TYPE = {
    "deepseek_v32": V32,
    "deepseek_v4": V4,
    "deepseek_v41": V4,
    "kimi_k2": KIMI_K2,
    "kimi_k25": KIMI_K25,
    "glm4_moe": GLM45,
    "glm4_moe_lite": GLM47,
    "glm_moe_dsa": GLM47,
}
_BY_TOKEN = {"｜DSML｜": V4, "<|tool_calls_section_begin|>": KIMI_K2, "<arg_key>": GLM45}


# A template of DeepSeek's own may teach either way of writing a call, and the parser reads both.
_EITHER = JsonCalls(
    (DEEPSEEK.call_begin,), (deepseek_v3.STYLE, deepseek_v31.STYLE), DEEPSEEK.all, deepseek_v3.SECTION
)


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
    own = replace(
        related or V3,
        name=OWN,
        tags=THINK if _reasons(checkpoint, source, names) else None,
        efforts=_efforts(names, checkpoint.habits),
        syntax=related.syntax if related else _deepseek_syntax(checkpoint, source),
    )
    plain = _with_parsers(own, calls, reasoning)
    if "tools" in names:
        return Chosen(plain, plain, source, checkpoint.habits.efforts)
    packaged = _with_parsers(
        replace(related or _deepseek(checkpoint, names), tags=own.tags), calls, reasoning
    )
    tools = packaged if _can_call(checkpoint) else plain
    return Chosen(plain, tools, source, checkpoint.habits.efforts)


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
    known = DEEPSEEK.call_begin in source or checkpoint.has_token(DEEPSEEK.call_begin)
    return _EITHER if known else None


def _related(checkpoint: Checkpoint) -> ChatFormat | None:
    """The packaged format of the model's family; None for DeepSeek V3, R1, V3.1 and unknown models."""
    form = _BY_TYPE.get(checkpoint.model_type)
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
        other = FORMATS[calls]
        form = replace(form, calls=other.calls, markup=form.markup | other.markup, syntax=other.syntax)
    if reasoning == "none":
        return replace(form, tags=None)
    return form if reasoning == "auto" else replace(form, tags=FORMATS[reasoning].tags)
