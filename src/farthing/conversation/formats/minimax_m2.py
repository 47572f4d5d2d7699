"""The calls of MiniMax-M2: all of an answer's between one pair of tags, with the names as attributes."""

from __future__ import annotations

from farthing.conversation.formats.tagged_xml import XmlTags, xml_format
from farthing.conversation.strict import Section

TAGS = XmlTags(
    open="<minimax:tool_call>",
    close="</minimax:tool_call>",
    call='<invoke name="',
    call_end="</invoke>",
    parameter='<parameter name="',
    parameter_end="</parameter>",
    named='">',
)
MINIMAX_M2 = xml_format(
    "minimax_m2",
    TAGS,
    opener=TAGS.call,
    begin='{name}">',
    end="</invoke>\n",
    section=Section("\n<minimax:tool_call>\n", "", "</minimax:tool_call>"),
    key='[^"<>\\n]{1,256}',
)
