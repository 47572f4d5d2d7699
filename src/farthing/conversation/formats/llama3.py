"""The calls of Llama 3.1 to 3.3 and of Granite: JSON without a closing tag.

Llama's answer is the JSON itself, which a grammar of calls amid text cannot tell from text.
"""

from __future__ import annotations

from farthing.conversation.base import CallFormat
from farthing.conversation.formats.named_json import CallMarks, NamedJsonCalls
from farthing.conversation.strict import JsonCalls, Section

LLAMA = CallMarks("<|python_tag|>", bare=True)
LLAMA3 = CallFormat(
    "llama3_json",
    lambda tools, tokens=frozenset(): NamedJsonCalls(LLAMA, tools, tokens),
    LLAMA.all,
    None,
)
_GRANITE = CallMarks("<|tool_call|>")
GRANITE = CallFormat(
    "granite",
    lambda tools, tokens=frozenset(): NamedJsonCalls(_GRANITE, tools, tokens),
    _GRANITE.all,
    JsonCalls(
        (_GRANITE.open,),
        (('[{"name": "{name}", "arguments": ', "}]"),),
        _GRANITE.all,
        Section("", "", ""),
    ),
)
