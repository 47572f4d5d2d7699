"""The calls of Qwen3-Coder and Qwen3.5: a tag for the function and one for each parameter, on lines."""

from __future__ import annotations

from farthing.conversation.formats.tagged_xml import XmlTags, xml_format
from farthing.conversation.strict import Section, TaggedCalls

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
    TaggedCalls(
        openers=(TAGS.open,),
        begin="\n<function={name}>",
        string="<parameter={name}>\n",
        json="<parameter={name}>\n",
        value_end="\n</parameter>",
        end="</function>\n</tool_call>",
        marks=TAGS.all,
        section=Section("", "\n", ""),
        key="[^<>\\n]{1,256}",
    ),
)
