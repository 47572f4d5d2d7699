"""Maps what a client requests of the reasoning to what the chat format can do. Clients send these fields to
every model, so what a format cannot do is ignored, with a warning in the log and in a header."""

from __future__ import annotations

import logging
from dataclasses import replace

from farthing.conversation.base import EFFORTS, ChatFormat
from farthing.conversation.types import Conversation
from farthing.server.schema import FieldNames

log = logging.getLogger(__name__)

IGNORED_HEADER = "X-Farthing-Ignored"  # names of the fields
SWITCHES = {"thinking", "enable_thinking"}  # passed to the chat template unchanged
_TYPES = {"enabled": True, "disabled": False, "adaptive": None, "auto": None}


def thinking_of(kind: str | None) -> tuple[bool | None, bool]:
    """What `thinking.type` says: whether to reason, and whether the word is known."""
    return (None, True) if kind is None else (_TYPES.get(kind), kind in _TYPES)


def mapped(conversation: Conversation, form: ChatFormat) -> Conversation:
    """The conversation with the nearest effort that the format knows, of two the higher one."""
    effort, levels = conversation.effort, [word for word in form.efforts if word != "none"]
    if effort is None or effort in form.efforts:
        return conversation
    if effort not in EFFORTS or not form.efforts or (effort == "none" and "none" not in form.efforts):
        effort = None
    elif levels:
        wanted = EFFORTS.index(effort)
        effort = min(levels, key=lambda word: (abs(EFFORTS.index(word) - wanted), -EFFORTS.index(word)))
    return replace(conversation, effort=effort)


def ignored(
    conversation: Conversation,
    budget: int | None,
    names: FieldNames,
    form: ChatFormat,
    *,
    opened: bool,
    own: bool,
) -> tuple[str, ...]:
    """The fields that the format cannot follow. opened: the prompt ends inside the reasoning. own: the format
    is the model's template."""
    effort, thinking = conversation.effort, conversation.thinking
    if own and conversation.template_options.keys() & SWITCHES:
        thinking = None
    switched = "none" in form.efforts
    always = form.tags is not None and (opened or not switched)  # or there is no telling
    never = form.tags is None and not form.efforts
    found: list[str] = []
    if effort == "none":
        found += [names.effort] * always
    elif effort is not None:
        found += [names.effort] * (effort not in EFFORTS or not form.efforts)
    if thinking is not None:
        found += [names.thinking] * (never if thinking else always)
    if budget is not None and form.tags is None:
        found.append(names.budget)
    return tuple(found)


def warn(fields: tuple[str, ...], form: ChatFormat) -> None:
    """Log the fields that were ignored, if any."""
    if fields:
        log.warning("ignored %s: the chat format %r has nothing to map it to", ", ".join(fields), form.name)
