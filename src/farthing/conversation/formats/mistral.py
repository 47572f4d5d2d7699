"""The calls of Mistral's models: a JSON list, or since Small 3.2 and Devstral a name and its arguments."""

from __future__ import annotations

from farthing.conversation.base import CallFormat
from farthing.conversation.formats.named_json import CallMarks, NamedJsonCalls
from farthing.conversation.strict import JsonCalls, Section

MARKS = CallMarks("[TOOL_CALLS]", separators=("[ARGS]", "[CALL_ID]"))


def _format(name: str, style: tuple[str, str]) -> CallFormat:
    """The parser reads both forms; style: the form to force."""
    return CallFormat(
        name,
        lambda tools, tokens=frozenset(): NamedJsonCalls(MARKS, tools, tokens),
        MARKS.all,
        JsonCalls((MARKS.open,), (style,), MARKS.all, Section("", "", "")),
    )


MISTRAL = _format("mistral", ("{name}[ARGS]", ""))
MISTRAL_LIST = _format("mistral_list", (' [{"name": "{name}", "arguments": ', "}]"))
