"""The calls of Qwen3-Coder and Qwen3.5: a tag for the function and one for each parameter, on lines."""

from __future__ import annotations

from farthing.conversation.formats.tagged_xml import XmlTags, xml_format
from farthing.conversation.strict import Section

TAGS = XmlTags(
    open="<tool_call>",
    close="</tool_call>",
    call="<function=",
    call_end="</function>",
    parameter="<parameter=",
    parameter_end="</parameter>",
    named=">",
    line="\n",
)
QWEN3_CODER = xml_format(
    "qwen3_coder",
    TAGS,
    opener=TAGS.open,
    begin="\n<function={name}>",
    end="</function>\n</tool_call>",
    section=Section("", "\n", ""),
    key="[^<>\\n]{1,256}",
)
