"""The calls of Hermes, Qwen2.5, Qwen3, Qwen3-Next and SmolLM3: one JSON object between `<tool_call>` tags."""

from __future__ import annotations

from farthing.conversation.base import CallFormat
from farthing.conversation.formats.named_json import CallMarks, NamedJsonCalls
from farthing.conversation.strict import JsonCalls, Section

MARKS = CallMarks("<tool_call>", "</tool_call>")
HERMES = CallFormat(
    "hermes",
    lambda tools, tokens=frozenset(): NamedJsonCalls(MARKS, tools, tokens),
    MARKS.all,
    JsonCalls(
        (MARKS.open,),
        (('\n{"name": "{name}", "arguments": ', f"}}\n{MARKS.close}"),),
        MARKS.all,
        Section("", "\n", ""),
    ),
)
